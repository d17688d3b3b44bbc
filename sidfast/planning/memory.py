"""Bytes of DeepSpeed's engines per GPU, by ZeRO stage, and the bytes that they send, per optimizer step.

As DeepSpeed 0.19 does it with its defaults, read off live engines (tests/test_plan.py compares): what is sharded, what
is whole, and what exists only for a while. Sizes are in bytes, P is a network's number of parameters, w the bytes of
one in the computing type.
"""

from dataclasses import dataclass

import torch

from sidfast.engines.engine import compute_dtype, moments_kept, offloads
from sidfast.engines.flat import BUCKET


@dataclass(frozen=True)
class Zero:
    """What of a `deepspeed` section, and of Adam, sizes depend on."""

    stage: int
    gpus: int
    width: int                                           # w
    offload: bool
    bucket: int                                          # elements
    live: int                                            # stage 3: elements of whole parameters kept at once
    moments: int = 2                                     # of Adam's two, those that are kept

    @classmethod
    def of(cls, section, gpus, adam):
        """From an engine's section (`engine_config`) and the configuration's Adam."""
        zero = section.get("zero_optimization", {})
        width = torch.empty((), dtype=compute_dtype(section)).element_size()
        stage = int(zero.get("stage", 0))
        overlap = zero.get("overlap_comm") and stage < 3
        return cls(stage, gpus, width, stage > 0 and offloads(section),
                   int(zero.get("reduce_bucket_size", 5e8)) * (2 if overlap else 1),
                   int(zero.get("stage3_max_live_parameters", 1e9)), len(moments_kept(adam, section)))

    def share(self, since):
        """The part of a tensor that one GPU keeps if stages from `since` on shard it."""
        return 1 / self.gpus if self.stage >= since else 1.0


def resident(zero, P):
    """{part: bytes on each GPU} of an engine between updates."""
    mixed = zero.width < 4 or zero.stage > 0             # DeepSpeed keeps fp32 masters even of fp32 weights then
    on_gpu = not zero.offload
    return {"weights": zero.width * P * zero.share(3),
            "masters": 4 * P * zero.share(1) * mixed * on_gpu,
            "moments": 4 * zero.moments * P * zero.share(1) * on_gpu,
            "gradients": zero.width * P / zero.gpus * (zero.stage == 3) * on_gpu,
            "bucket": zero.width * zero.bucket * (zero.stage == 3)}


def on_host(zero, P):
    """Bytes in host memory per process: masters, moments, and fp32 gradients of an offloaded optimizer."""
    return (4 + 4 * zero.moments + 4) * P / zero.gpus * zero.offload


def sums(zero, P):
    """Bytes of the sums of gradients over micro-batches, in fp32, below stage 3; both networks share them."""
    return 4 * P * (zero.stage < 3)


def during_flush(zero, P):
    """Bytes while an engine below stage 3 takes the sums over: gradients in the computing type (the sums themselves at
    stage 0 in fp32), the buckets in which they are reduced, and stage 2's own part. At stage 2 the gradients are one
    bucket at a time (two, if a bucket is smaller), and its own part whole buckets; offloading takes a bucket's norm in
    fp64."""
    bucket = min(P, BUCKET)
    whole = bucket * (2 if zero.bucket < bucket else 1) if zero.stage == 2 else P
    gradients = zero.width * whole * (zero.width < 4 or zero.stage == 1)
    own = min(P, P / zero.gpus + 2 * bucket * (zero.gpus > 1))
    partition = zero.width * own * (zero.stage == 2 and not zero.offload) + 8 * bucket * zero.offload
    return gradients + partition + zero.width * zero.bucket * (zero.stage in (1, 2))


def gathered(zero, P):
    """Stage 3: bytes of whole parameters of a network while it runs, beside its own share."""
    return zero.width * min(P, zero.live) * (zero.stage == 3)


def during_step(zero, P):
    """Bytes that the optimizer's step adds: gradients as the optimizer takes them."""
    if zero.offload or (zero.stage == 0 and zero.width == 4):
        return zero.width * P * (zero.stage == 0)
    if zero.stage == 0:
        return (zero.width + 4) * P
    return (zero.width + (4 if zero.width < 4 else 0)) * P / zero.gpus


def sent_per_step(zero, P, accumulation, factor=1):
    """Bytes that a GPU sends for one step of each of the two engines (and receives as many).

    Ring collectives send (N - 1) / N of what they move, an all-reduce twice that. Stages 0 to 2 reduce gradients once a
    step, stage 3 after each of `accumulation` micro-batches (of the fake score, after every `factor` of them).
    DeepSpeed reduces by all-reduce in stages 1 and 2, and by reduce-scatter in stage 3, which also gathers weights for
    every pass of a network: of the trained one forward and backward, of the generator for the fake score's update, and
    of the fake score and the teacher, twice each, for the generator's.
    """
    ring, size = (zero.gpus - 1) / zero.gpus, zero.width * P
    if zero.stage == 0:
        return 2 * 2 * size * ring
    if zero.stage == 3:
        fake_score, generator = (1 + 2 + 1) * size, (1 + 2 + 2 + 2) * size
        return accumulation * (fake_score / factor + generator) * ring
    return 2 * (2 * size + size) * ring
