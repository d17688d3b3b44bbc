"""What the two updates of Score identity Distillation compute (method.md, sections 4 and 5).

Both are functions `compute(network, batch, keep) -> (mean loss, finite [N], losses [N], x_g)` of the network that is
trained; samples with keep [N] (bool) False count as 0. Optimizers, accumulation and CUDA graphs are not their business
(engines/update.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from sidfast.kernels.noising import add_noise
from sidfast.method.conditions import Conditions, dtype_of, expand, select
from sidfast.method.equations import (
    Predict,
    copies,
    drop_prompts,
    fake_score_loss,
    generator_loss,
    predict_guided,
)
from sidfast.method.generator import generate
from sidfast.method.schedule import Schedule


@dataclass(frozen=True)
class Objective:
    """What is optimised, in method.md's symbols: the four scales of eq. 3, alpha of eq. 8, and the timestep t_init of
    eq. 4. `predict`: how a network of the teacher's family is called."""

    schedule: Schedule
    predict: Predict
    kappa1: float
    kappa2: float
    kappa3: float
    kappa4: float
    alpha: float = 1.0
    t_init: int = 625


class Batch(NamedTuple):
    """One micro-batch: conditions of N samples, and of the empty prompt (one sample); z and eps [N, C, H, W], timesteps
    t [N], dropped [N] (bool: without text); and what a source of images may need in addition (the generator does not):
    noise [N, num_extra_noise, C, H, W]; teacher_draw [N], below the share of the teacher's images for those that are
    its own."""

    cond: Conditions
    uncond: Conditions
    z: torch.Tensor
    eps: torch.Tensor
    t: torch.Tensor
    dropped: torch.Tensor
    noise: torch.Tensor = torch.empty(0)
    teacher_draw: torch.Tensor = torch.empty(0)

    def tensors(self) -> list[torch.Tensor]:
        """All tensors in a fixed order; see `with_tensors`."""
        return [*self.cond.values(), *self.uncond.values(), *self[2:]]

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> "Batch":
        """A Batch of the same keys with other tensors, in the order of `tensors`."""
        k = len(self.cond)
        return Batch(dict(zip(self.cond, tensors[:k], strict=True)),
                     dict(zip(self.uncond, tensors[k:2 * k], strict=True)), *tensors[2 * k:])


def sequential(first: Callable, second: Callable, device: torch.device) -> tuple[Any, Any]:
    """(first(), second())."""
    return first(), second()


def fake_score_step(objective: Objective, source: Callable[[Batch], torch.Tensor]) -> Callable:
    """The fake score's `compute` (eq. 5) on the images x_g [N, C, H, W] of `source(batch)`."""
    kappas = [objective.kappa1]

    def compute(fake_score, batch, keep):
        a, s = objective.schedule.coefficients(batch.t)
        with torch.no_grad():
            x_g = torch.where(keep[:, None, None, None], source(batch), 0)
            _, x_in = add_noise(x_g, batch.eps, a, s, copies(fake_score, kappas), dtype_of(batch.cond))
        cond = drop_prompts(batch.cond, batch.uncond, batch.dropped)
        output = predict_guided(objective.predict, fake_score, x_in, batch.t, cond, batch.uncond, kappas)
        loss, finite = fake_score_loss(output, x_g, batch.eps, a, s, objective.schedule, objective.kappa1)
        finite = finite & loss.isfinite() & x_g.isfinite().flatten(1).all(1)
        loss = torch.where(keep, loss, 0)
        return loss.mean(), finite, loss.detach(), x_g

    return compute


def generator_step(objective: Objective, fake_score: Callable, teacher: Callable, run: Callable = sequential
                   ) -> Callable:
    """The generator's `compute` (eqs. 6 to 8). Gradients pass through both denoisers, whose weights are frozen; `run`:
    how the passes of the two are run, one after the other or at the same time."""
    kappas, predict = (objective.kappa2, objective.kappa3, objective.kappa4), objective.predict

    def compute(generator, batch, keep):
        a, s = objective.schedule.coefficients(batch.t)
        x_g = generate(generator, batch.z, batch.cond, objective)
        rows = copies(fake_score, kappas[:2]), copies(teacher, kappas[2:])
        x_t, x_in = add_noise(x_g, batch.eps, a, s, max(rows), dtype_of(batch.cond))
        x_fake, x_real = (x_in if k == max(rows) else x_in[:k * len(x_t)] for k in rows)
        inputs = batch.t, batch.cond, batch.uncond
        o_fake, o_real = run(lambda: predict_guided(predict, fake_score, x_fake, *inputs, kappas[:2]),
                             lambda: predict_guided(predict, teacher, x_real, *inputs, kappas[2:]), x_t.device)
        loss, finite = generator_loss(x_g, x_t, o_real, o_fake, a, s, objective.schedule, kappas, objective.alpha)
        finite, loss = finite & loss.isfinite(), torch.where(keep, loss, 0)
        return loss.mean(), finite, loss.detach(), x_g.detach()

    return compute


def leave_out(batch: Batch, finite: torch.Tensor) -> tuple[Batch, torch.Tensor]:
    """(a Batch with the first finite sample in the place of those that are not, keep [N]): keep is False for these.
    If no sample is finite, zeros without text take their place. The teacher draws none of the replaced samples: their
    images do not matter, and it would have more than its share."""
    if not finite.any():
        zeros: dict[str, Any] = {name: torch.zeros_like(getattr(batch, name)) for name in ("z", "eps", "noise")}
        return batch._replace(cond=expand(batch.uncond, len(finite)), **zeros), finite
    rows = torch.where(finite, torch.arange(len(finite), device=finite.device), finite.to(torch.uint8).argmax())
    taken = Batch(select(batch.cond, rows), batch.uncond, *(v[rows] for v in batch[2:]))
    return taken._replace(teacher_draw=torch.where(finite, batch.teacher_draw, 1)), finite
