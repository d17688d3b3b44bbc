"""Score identity Distillation with Long and Short Guidance: the two updates (method.md, sections 3 to 5).

`generator` and `fake_score` are DeepSpeed engines (or anything with `module`, `backward(loss)` and `step()`, where step
acts at the accumulation boundary); `teacher` is a frozen module.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from sidfast.kernels.guidance import denoise_reference
from sidfast.kernels.noising import add_noise_reference
from sidfast.method.denoise import denoise_coefficients, predict
from sidfast.method.guidance import drop_prompts, predict_guided
from sidfast.method.losses import fake_score_loss, generator_loss
from sidfast.method.noise import NoiseSchedule


class Networks(NamedTuple):
    """The three networks."""

    generator: object
    fake_score: object
    teacher: object


@dataclass(frozen=True)
class Objective:
    """What is optimised: method.md's symbols."""

    schedule: NoiseSchedule
    prediction_type: str
    kappa1: float
    kappa2: float
    kappa3: float
    kappa4: float
    alpha: float = 1.0
    t_init: int = 625


class Batch(NamedTuple):
    """One micro-batch: text [N, L, D], null [1, L, D], z and eps [N, C, H, W], t [N], dropped [N] (bool)."""

    text: torch.Tensor
    null: torch.Tensor
    z: torch.Tensor
    eps: torch.Tensor
    t: torch.Tensor
    dropped: torch.Tensor


class Sums(NamedTuple):
    """Of one update on this process, on the device: mean loss per sample, and the number of samples left out."""

    loss: torch.Tensor
    non_finite: torch.Tensor


def generate(generator, z, text, objective):
    """One-step images x_g [N, C, H, W] from noise z and text (eq. 4)."""
    t = torch.full((z.shape[0],), objective.t_init, device=z.device)
    a, s = objective.schedule.coefficients(t)
    A, B = denoise_coefficients(objective.prediction_type, a, s)
    x_t = s[:, None, None, None] * z
    return denoise_reference(predict(generator, x_t, t, text), x_t, A, B, 1)


def update_fake_score(networks, batches, objective):
    """One optimizer step of the fake score on the generator's images (eq. 5). Non-finite images do not count."""
    losses, left_out = [], []
    for batch in batches:
        a, s = objective.schedule.coefficients(batch.t)
        with torch.no_grad():
            x_g = generate(networks.generator.module, batch.z, batch.text, objective)
            usable = x_g.isfinite().flatten(1).all(1)    # (0 times a non-finite activation would not be 0)
            x_g = torch.where(usable[:, None, None, None], x_g, 0)
            x_t = add_noise_reference(x_g, batch.eps, a, s)
        text = drop_prompts(batch.text, batch.null, batch.dropped)
        output = predict_guided(networks.fake_score, x_t, batch.t, text, batch.null, [objective.kappa1])
        loss, finite = fake_score_loss(output, x_g, batch.eps, a, s, objective.prediction_type, objective.kappa1)
        loss, finite = torch.where(usable, loss, 0), finite & usable
        networks.fake_score.backward(loss.mean())
        networks.fake_score.step()                       # steps at the accumulation boundary
        losses.append(loss.detach().mean())
        left_out.append((~finite).sum())
    return Sums(torch.stack(losses).mean(), torch.stack(left_out).sum())


def update_generator(networks, batches, objective):
    """One optimizer step of the generator; gradients pass through both denoisers, which stand still (eq. 8)."""
    losses, left_out = [], []
    kappas = (objective.kappa2, objective.kappa3, objective.kappa4)
    fake_score = networks.fake_score.module              # the engine itself would prepare for a backward of its own
    with _frozen(fake_score):
        for batch in batches:
            a, s = objective.schedule.coefficients(batch.t)
            x_g = generate(networks.generator, batch.z, batch.text, objective)
            x_t = add_noise_reference(x_g, batch.eps, a, s)
            o_real = predict_guided(networks.teacher, x_t, batch.t, batch.text, batch.null, kappas[2:])
            o_fake = predict_guided(fake_score, x_t, batch.t, batch.text, batch.null, kappas[:2])
            loss, finite = generator_loss(x_g, x_t, o_real, o_fake, a, s, objective.prediction_type, kappas,
                                          objective.alpha)
            _stop_non_finite(x_g, finite)
            networks.generator.backward(loss.mean())
            networks.generator.step()
            losses.append(loss.detach().mean())
            left_out.append((~finite).sum())
    return Sums(torch.stack(losses).mean(), torch.stack(left_out).sum())


def _stop_non_finite(x_g, finite):
    """Drop the gradient of samples that do not count: 0 times a non-finite activation is not 0."""
    keep = finite[:, None, None, None]
    x_g.register_hook(lambda gradient: torch.where(keep, gradient, 0))


class _frozen:
    """A network's parameters take no gradients inside the block; gradients still pass through to its input."""

    def __init__(self, module):
        self.parameters = [p for p in module.parameters() if p.requires_grad]

    def __enter__(self):
        for p in self.parameters:
            p.requires_grad_(False)

    def __exit__(self, *_):
        for p in self.parameters:
            p.requires_grad_(True)
