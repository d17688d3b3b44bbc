"""`train.micro_batch: "auto"`: the largest micro-batch that fits, from what the updates really allocate here."""

import copy
import os
from dataclasses import replace

import torch

from sidfast.accel.plan import largest_pass, resolve_acceleration
from sidfast.common.errors import UserError
from sidfast.engines.engine import ENGINES, compute_dtype, zero_stages
from sidfast.method.synthetic import SOURCES
from sidfast.planning.planner import CONTEXT, GIB, Planner
from sidfast.teachers.load import load_meta_teacher

_LARGEST = 32                                            # beyond that a GPU gains little


def find_micro_batch(config, teacher, processes, device):
    """The configuration with a number for `train.micro_batch`; all processes come to the same one.

    One update of each network runs at two small sizes on `device`, as it will run in training; from the tensors that it
    makes follows what any size needs (footprint.py), and DeepSpeed's share is known (memory.py). Raises UserError if
    not even the smallest micro-batch fits, or the global batch does not divide among the processes.
    """
    train = config.train
    if train.micro_batch != "auto":
        return config
    share = train.batch_size // processes
    if train.batch_size % (processes * train.fake_score_factor):
        factor = f" x train.fake_score_factor ({train.fake_score_factor})" if train.fake_score_factor > 1 else ""
        raise UserError(f"train.batch_size ({train.batch_size}) must be a multiple of the number of processes "
                        f"({processes}){factor}")
    sizes = [m for m in range(1, min(share, _LARGEST) + 1) if share % (m * train.fake_score_factor) == 0]
    limit = _memory(device) - (CONTEXT if device.type == "cuda" else 0)
    needed = _needed(config, teacher, sizes, processes, device)
    chosen = _agreed(max((m for m in sizes if needed[m] <= limit), default=0))
    if not chosen:
        raise UserError(f"train.micro_batch: not even {sizes[0]} fits: it needs {needed[sizes[0]] / GIB:.3g} GiB of "
                        f"{limit / GIB:.3g}; `sidfast plan` shows what would fit")
    return config.model_copy(update={"train": train.model_copy(update={"micro_batch": chosen})})


def _needed(config, teacher, sizes, processes, device):
    """{micro-batch: bytes on this device}."""
    dtype = compute_dtype(config.deepspeed)
    teacher.network.to(device)                              # where training wants it too
    # (attention that was asked for need not manage the largest micro-batch, only the one that will fit)
    rows = largest_pass(config, sizes[-1 if config.speed.attention == "auto" else 0])
    latent_shape = teacher.latent_shape(config.model.resolution)
    speed = resolve_acceleration(config.speed, teacher, latent_shape, rows, zero_stages(config), dtype, device)
    speed = replace(speed, compile=False)                # which takes minutes and as much memory

    def prepare(checkpointing):
        network = speed.prepare(copy.deepcopy(teacher.network).to(device, dtype))
        speed.refresh(network)
        return network

    planner = Planner(config, teacher, prepare=prepare)
    try:
        planner.footprints(config.speed.gradient_checkpointing)
    except torch.OutOfMemoryError:                       # whole networks do not fit: by their shapes, then
        planner = Planner(config, load_meta_teacher(str(teacher.folder), **config.model.loading))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    P = sum(p.numel() for p in teacher.network.parameters())
    weights = P * torch.empty((), dtype=dtype).element_size()
    copies = 1 if SOURCES[config.synthetic.source].copy else 0
    needed = {m: max(
        planner.option(*planner.configured(name), m, config.speed.gradient_checkpointing, processes).bytes
        for name in ENGINES) for m in sizes}
    return {m: n + copies * (weights + max(planner.packed)) for m, n in needed.items()}


def _memory(device):
    """Bytes of the device; without a GPU, this process's share of the host's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / local


def _agreed(size):
    """The smallest of all processes' sizes."""
    sizes = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(sizes, size)
    return min(sizes)
