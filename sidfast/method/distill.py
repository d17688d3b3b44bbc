"""Score identity Distillation with Long and Short Guidance: the two updates (method.md, sections 3 to 5).

Generator and fake score are trained by DeepSpeed engines, or by anything with `module` (an EngineModule), a call that
runs it, `backward(loss)` and `step()`, where step acts at the accumulation boundary; the teacher is a frozen UNet.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch

from sidfast.accel.graphs import sequential
from sidfast.common.errors import NothingFinite
from sidfast.engines.accumulate import GradientAccumulator
from sidfast.kernels.guidance import denoise
from sidfast.kernels.noising import add_noise
from sidfast.method.denoise import denoise_coefficients, predict
from sidfast.method.guidance import copies, drop_prompts, predict_guided
from sidfast.method.losses import fake_score_loss, generator_loss
from sidfast.method.noise import NoiseSchedule


class Networks(NamedTuple):
    """Two engines (see above), and the teacher's UNet, frozen."""

    generator: object
    fake_score: object
    teacher: torch.nn.Module


@dataclass(frozen=True)
class Objective:
    """What is optimised, in method.md's symbols: the four scales of eq. 3, alpha of eq. 8, and the timestep t_init of
    eq. 4. `prediction_type`: one of PREDICTION_TYPES, for eqs. 2 and 5."""

    schedule: NoiseSchedule
    prediction_type: str
    kappa1: float
    kappa2: float
    kappa3: float
    kappa4: float
    alpha: float = 1.0
    t_init: int = 625


class Batch(NamedTuple):
    """One micro-batch: text [N, L, D], null [1, L, D], z and eps [N, C, H, W], timesteps t [N], dropped [N] (bool:
    without text); and what a source of images may need besides: noise [N, noises, C, H, W]; chance [N], below the share
    of the teacher's images (Batches) for those that are its own."""

    text: torch.Tensor
    null: torch.Tensor
    z: torch.Tensor
    eps: torch.Tensor
    t: torch.Tensor
    dropped: torch.Tensor
    noise: torch.Tensor
    chance: torch.Tensor


class UpdateOutput(NamedTuple):
    """Of one update on this process, on the device: mean loss per sample, the number of samples left out, the samples'
    own losses and noise levels t, [N] each over all micro-batches, and the images x_g of each micro-batch, as they came
    out."""

    loss: torch.Tensor
    non_finite: torch.Tensor
    losses: torch.Tensor
    t: torch.Tensor
    images: list


def generate(generator, z, text, objective):
    """One-step images x_g [N, C, H, W] from noise z [N, C, H, W] and text [N, L, D] (eq. 4)."""
    _, s = objective.schedule.coefficients(torch.full((z.shape[0],), objective.t_init, device=z.device))
    return denoise_at(generator, s[:, None, None, None] * z, objective.t_init, text, objective)


def denoise_at(network, x_t, level, text, objective):
    """x_hat [N, C, H, W] of x_t [N, C, H, W] at one timestep for all samples, `level`, in one conditional pass (eq. 2).

    Raises ValueError for an unknown prediction type.
    """
    t = torch.full((x_t.shape[0],), level, device=x_t.device)
    A, B = denoise_coefficients(objective.prediction_type, *objective.schedule.coefficients(t))
    return denoise(predict(network, x_t, t, text), x_t, A, B, 1)


def fake_score_update(networks, objective, source=None, **options):
    """The fake score's Update (eq. 5) on the images x_g [N, C, H, W] of `source(batch)`, the generator's own (eq. 4)
    unless given. `options` of Update."""
    source = source or (lambda batch: generate(networks.generator.module.denoiser, batch.z, batch.text, objective))

    def compute(fake_score, *tensors):
        batch, keep = Batch(*tensors[:-1]), tensors[-1]
        a, s = objective.schedule.coefficients(batch.t)
        with torch.no_grad():
            x_g = torch.where(keep[:, None, None, None], source(batch), 0)
            _, x_in = add_noise(x_g, batch.eps, a, s, copies(fake_score, kappas), batch.text.dtype)
        text = drop_prompts(batch.text, batch.null, batch.dropped)
        output = predict_guided(fake_score, x_in, batch.t, text, batch.null, kappas)
        loss, finite = fake_score_loss(output, x_g, batch.eps, a, s, objective.prediction_type, objective.kappa1)
        finite = finite & loss.isfinite() & x_g.isfinite().flatten(1).all(1)
        loss = torch.where(keep, loss, 0)
        return loss.mean(), finite, loss.detach(), x_g

    kappas = [objective.kappa1]
    return Update(networks.fake_score, compute, **options)


def generator_update(networks, objective, run=sequential, **options):
    """The generator's Update (eqs. 6 to 8). Gradients pass through both denoisers, which stand still; `run`: sequential
    or concurrent (accel/graphs.py) for the passes of the two. `options` of Update."""
    kappas = (objective.kappa2, objective.kappa3, objective.kappa4)

    def compute(generator, *tensors):
        batch, keep = Batch(*tensors[:-1]), tensors[-1]
        a, s = objective.schedule.coefficients(batch.t)
        x_g = generate(generator, batch.z, batch.text, objective)
        rows = copies(trained.unet, kappas[:2]), copies(networks.teacher, kappas[2:])
        x_t, x_in = add_noise(x_g, batch.eps, a, s, max(rows), batch.text.dtype)
        x_fake, x_real = (x_in if k == max(rows) else x_in[:k * len(x_t)] for k in rows)
        inputs = batch.t, batch.text, batch.null
        o_fake, o_real = run(lambda: predict_guided(fake_score, x_fake, *inputs, kappas[:2]),
                             lambda: predict_guided(networks.teacher, x_real, *inputs, kappas[2:]), x_t.device)
        loss, finite = generator_loss(x_g, x_t, o_real, o_fake, a, s, objective.prediction_type, kappas,
                                      objective.alpha)
        finite, loss = finite & loss.isfinite(), torch.where(keep, loss, 0)
        return loss.mean(), finite, loss.detach(), x_g.detach()

    trained = networks.fake_score.module                 # the engine itself would prepare for a backward of its own
    fake_score = trained.denoiser
    return Update(networks.generator, compute, frozen=trained.unet, **options)


class Update:
    """One optimizer step of an engine's network, out of one global batch; made by the two functions above.

    `compute(unet, *batch, keep) -> (mean loss, finite [N], losses [N], x_g)`, where samples with keep [N] (bool) False
    count as 0. A sample that turns out non-finite takes its gradients with it: 0 times an infinite activation is not 0,
    and weights are shared by all samples. Its micro-batch is then computed once more with another sample in its place
    (`leave_out`). `agree(all finite)` makes all processes do it together, where a pass is a collective call (ZeRO stage
    3).

    An engine whose EngineModule is flat does not accumulate: a GradientAccumulator (engines/accumulate.py) does, with
    `sums` and `capture` as there, and `scale(engine)` the factor that the engine puts on the loss (fp16). `frozen`: a
    network whose parameters take no gradients meanwhile.
    """

    def __init__(self, engine, compute, agree=None, sums=None, capture=None, scale=lambda engine: 1.0, frozen=None):
        self.engine, self.compute, self.agree, self.scale, self.frozen = engine, compute, agree or bool, scale, frozen
        self.summed = engine.module.flat and GradientAccumulator(
            engine.module, compute, leave_out, sums, capture, agree)

    def __call__(self, batches):
        """Returns UpdateOutput over `batches`, the micro-batches. Raises Diverged if the network has diverged."""
        run = self._run_summed if self.summed else self._run
        with _frozen(self.frozen):
            finite, each, images = zip(*run([_tensors(batch) for batch in batches]), strict=True)
        return UpdateOutput(torch.stack([losses.mean() for losses in each]).mean(), (~torch.cat(finite)).sum(),
                            torch.cat(each), torch.cat([batch.t for batch in batches]), list(images))

    def _run(self, micro_batches):
        """(finite, losses, x_g) of each micro-batch, and a step of the engine."""
        for tensors in micro_batches:
            loss, finite, each, x_g = self.engine(self.compute, *tensors)
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

    def warm_up(self, batch):
        """Let a captured update get ready for the capture of its passes, on a Batch of the size that will come."""
        with _frozen(self.frozen):
            self.summed.warm_up(*_tensors(batch))

    def _without(self, tensors, finite):
        loss, again, each, _ = self.engine(self.compute, *leave_out(tensors, finite))
        if not again.all():
            raise NothingFinite
        return loss, each


def _tensors(batch):
    """What `compute` takes: all samples are kept."""
    return *batch, torch.ones_like(batch.dropped)


def leave_out(tensors, finite):
    """An Update's tensors (*batch, keep) with the first finite sample in the place of those that are not (with zeros
    and no text if none is), and keep False for these. The teacher draws none of them: their images do not matter, and
    it would have more of its own than it draws."""
    batch = Batch(*tensors[:-1])
    if not finite.any():
        zeros = {name: torch.zeros_like(getattr(batch, name)) for name in ("z", "eps", "noise")}
        return *batch._replace(text=batch.null.expand_as(batch.text), **zeros), finite
    rows = torch.where(finite, torch.arange(len(finite), device=finite.device), finite.to(torch.uint8).argmax())
    taken = batch._replace(**{name: v[rows] for name, v in batch._asdict().items() if name != "null"})
    return *taken._replace(chance=torch.where(finite, batch.chance, 1)), finite


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
