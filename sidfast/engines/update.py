"""One optimizer step of an engine's network, out of one global batch.

Engines are DeepSpeed's, or anything with `module` (an EngineModule), a call that runs it, `backward(loss)` and
`step()`, where step acts at the accumulation boundary.
"""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from sidfast.common.errors import NothingFinite
from sidfast.engines.accumulate import GradientAccumulator
from sidfast.method.generator import generate
from sidfast.method.updates import Batch, Objective, fake_score_step, generator_step, leave_out, sequential


class Networks(NamedTuple):
    """Two engines (see above), and the teacher's network, frozen."""

    generator: Any
    fake_score: Any
    teacher: torch.nn.Module


class UpdateOutput(NamedTuple):
    """Of one update on this process, on the device: mean loss per sample, the number of samples left out, the samples'
    own losses and noise levels t, [N] each over all micro-batches, and the images x_g of each micro-batch, as they came
    out."""

    loss: torch.Tensor
    non_finite: torch.Tensor
    losses: torch.Tensor
    t: torch.Tensor
    images: list


def fake_score_update(networks: Networks, objective: Objective, source: Callable | None = None, **options) -> "Update":
    """The fake score's Update on the images of `source(batch)`, by default the generator's own (eq. 4). `options` of
    Update."""
    generator = networks.generator.module.denoiser
    source = source or (lambda batch: generate(generator, batch.z, batch.cond, objective))
    return Update(networks.fake_score, fake_score_step(objective, source), **options)


def generator_update(networks: Networks, objective: Objective, run: Callable = sequential, **options) -> "Update":
    """The generator's Update; `run`: how the passes of teacher and fake score are run. `options` of Update."""
    trained = networks.fake_score.module                 # the engine itself would prepare for a backward of its own
    compute = generator_step(objective, trained.denoiser, networks.teacher, run)
    return Update(networks.generator, compute, frozen=trained.network, **options)


class Update:
    """One optimizer step of an engine's network; made by the two functions above.

    `compute`: as those of method/updates.py. A sample that turns out non-finite takes its gradients with it: 0 times an
    infinite activation is not 0, and weights are shared by all samples. Its micro-batch is then computed once more with
    another sample in its place (`leave_out`). `agree(all finite)` makes all processes do it together, where a pass is a
    collective call (ZeRO stage 3).

    An engine whose EngineModule is flat does not accumulate: a GradientAccumulator (accumulate.py) does, with `sums`
    and `capture` as there, and `scale(engine)` the factor that the engine puts on the loss (fp16). `frozen`: a network
    whose parameters take no gradients meanwhile.
    """

    def __init__(self, engine, compute, agree=None, sums=None, capture=None, scale=lambda engine: 1.0, frozen=None):
        self.engine, self.compute, self.agree, self.scale, self.frozen = engine, compute, agree or bool, scale, frozen
        self._keys = None                                # a Batch with the keys of all
        self.summed = engine.module.flat and GradientAccumulator(
            engine.module, self._compute, self._leave_out, sums, capture, agree)

    def __call__(self, batches: list[Batch]) -> UpdateOutput:
        """The update on micro-batches. Raises NothingFinite if the network has diverged."""
        self._keys = batches[0]
        run = self._run_summed if self.summed else self._run
        with _frozen(self.frozen):
            finite, each, images = zip(*run([_tensors(batch) for batch in batches]), strict=True)
        return UpdateOutput(torch.stack([losses.mean() for losses in each]).mean(), (~torch.cat(finite)).sum(),
                            torch.cat(each), torch.cat([batch.t for batch in batches]), list(images))

    def warm_up(self, batch: Batch) -> None:
        """Let a captured update get ready for the capture of its passes, on a Batch of the size that will come."""
        self._keys = batch
        with _frozen(self.frozen):
            self.summed.warm_up(*_tensors(batch))

    def _compute(self, network, *tensors):
        return self.compute(network, self._keys.with_tensors(tensors[:-1]), tensors[-1])

    def _leave_out(self, tensors, finite):
        return _tensors(*leave_out(self._keys.with_tensors(tensors[:-1]), finite))

    def _run(self, micro_batches):
        """(finite, losses, x_g) of each micro-batch, and a step of the engine."""
        for tensors in micro_batches:
            loss, finite, each, x_g = self.engine(self._compute, *tensors)
            if not self.agree(finite.all()):
                loss, each = self._without(tensors, finite)
            self.engine.backward(loss)
            self.engine.step()                           # steps at the accumulation boundary
            yield finite, each, x_g

    def _run_summed(self, micro_batches):
        weight = self.scale(self.engine) / len(micro_batches)
        for k, tensors in enumerate(micro_batches):
            finite, each, x_g = self.summed(weight, k == 0, *tensors)
            yield finite, torch.where(finite, each, 0), x_g
        self.engine.backward(self.engine(self.summed.flush))
        self.engine.step()

    def _without(self, tensors, finite):
        loss, again, each, _ = self.engine(self._compute, *self._leave_out(tensors, finite))
        if not again.all():
            raise NothingFinite
        return loss, each


def _tensors(batch, keep=None):
    """A Batch and its `keep` (default: all samples) as one tuple of tensors."""
    return *batch.tensors(), torch.ones_like(batch.dropped) if keep is None else keep


@contextmanager
def _frozen(module):
    """A network's parameters take no gradients inside the block; gradients still pass through to its input."""
    parameters = [p for p in module.parameters() if p.requires_grad] if module is not None else []
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)
