"""The images that train the fake score (method.md, section 7): who draws them, and what is done to them.

A source is a class with a name and one method, `__call__(batch) -> x_g`; a degradation likewise, `__call__(x, noise)`.
To define the class is to make it known to the configuration (docs/ablations.md). Everything random comes with the
batch, so that a source's images do not depend on micro-batches or processes, and resume exactly.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from sidfast.method.conditions import select
from sidfast.method.equations import copies, passes, predict_guided
from sidfast.method.generator import denoise_at, generate

if TYPE_CHECKING:
    from sidfast.method.updates import Batch, Objective

SOURCES: dict[str, type["Source"]] = {}                  # name -> class
DEGRADATIONS: dict[str, type] = {}


class Source:
    """Draws images with a generator. `class Mine(Source, name="mine")` is `synthetic.source = "mine"`.

    `options`: the keys of the `synthetic` section that it needs, handed to it by name, meaningless elsewhere;
    `copy`: "ema" or "stale" to draw with that copy of the generator, which training keeps up, in place of the generator
    itself; `capturable`: whether a CUDA graph may hold it, i.e. no shape or branch depends on values;
    `num_extra_noise`: how many more noise tensors it takes for an image.
    """

    options: tuple[str, ...] = ()
    copy: str | None = None
    capturable = True
    num_extra_noise = 0

    def __init_subclass__(cls, name=None, **options):
        super().__init_subclass__(**options)
        if name is not None:
            SOURCES[name] = cls

    def __init__(self, network, objective):
        """`network`: the generator's, or that of its `copy`; `objective`: the run's Objective."""
        self.network, self.objective = network, objective

    def generate(self, batch: "Batch") -> torch.Tensor:
        """One-step images [N, C, H, W] of a Batch (eq. 4)."""
        return generate(self.network, batch.z, batch.cond, self.objective)

    def __call__(self, batch):
        """Images x_g [N, C, H, W] in fp32 for a Batch, whose `noise` is [N, num_extra_noise, C, H, W]; without
        gradient."""
        raise NotImplementedError


class Generator(Source, name="generator"):
    """The generator as it is."""

    def __call__(self, batch):
        """As Source's: one pass (eq. 4)."""
        return self.generate(batch)


class Shared(Source):
    """The generator's images out of its own update of the same step, in the place of the first noise: one pass less.
    Chosen by `speed.share_generator_forward`. The two updates then see the networks as they were before both."""

    num_extra_noise = 1

    def __call__(self, batch):
        """As Source's: no pass; x_g is noise[:, 0]."""
        return batch.noise[:, 0]


class Ema(Generator, name="ema"):
    """The generator's average."""

    copy = "ema"


class Stale(Generator, name="stale"):
    """The generator as it was `stale_by` updates ago."""

    copy, options = "stale", ("stale_by", "stale_every")

    def __init__(self, network, objective, stale_by, stale_every):
        super().__init__(network, objective)                # (training keeps the copy as old as that)


class MultiStep(Source, name="multistep"):
    """The generator run several times: its image is brought back to a lower noise level with fresh noise, and
    denoised from there. The levels are evenly spaced timesteps from t_init down: for 4 steps t_init times 1, 3/4, 1/2,
    1/4."""

    options = ("steps",)

    def __init__(self, network, objective, steps):
        super().__init__(network, objective)
        self.num_extra_noise = steps - 1
        self.levels = [round(objective.t_init * (steps - i) / steps) for i in range(steps)]

    def __call__(self, batch):
        """As Source's: eq. 4, then eqs. 1 and 2 with noise[:, i] for each further step."""
        x = self.generate(batch)
        for level, eps in zip(self.levels[1:], batch.noise[:, :self.num_extra_noise].unbind(1), strict=True):
            a, s = self.objective.schedule.coefficients(torch.full((len(x),), level, device=x.device))
            x_t = a[:, None, None, None] * x + s[:, None, None, None] * eps
            x = denoise_at(self.network, x_t, level, batch.cond, self.objective)
        return x


class TeacherShare:
    """Another source's images, of which a share is replaced by the teacher's: DDIM from the same z and text.

    So that shapes depend on no value, the teacher draws as many rows of each batch as the share is of it, rounded up:
    no batch has more rows of its own (`Batches` deals them out evenly).
    """

    def __init__(self, inner, teacher, predict, scheduler, share, steps, guidance):
        """`inner`: the Source; `teacher`: its network; `predict`: an Objective's; `scheduler`: a diffusers
        DDIMScheduler, run for `steps` steps; `share`: the probability of each image; `guidance`: kappa of eq. 3."""
        self.inner, self.teacher, self.predict, self.scheduler = inner, teacher, predict, scheduler
        self.share, self.guidance, self.num_extra_noise = share, guidance, inner.num_extra_noise
        scheduler.set_timesteps(steps)

    def __call__(self, batch):
        """As Source's; rows with teacher_draw < share are the teacher's."""
        x = self.inner(batch)
        rows = batch.teacher_draw.argsort()[:math.ceil(self.share * len(x) - 1e-9)]
        drawn = self._sample(batch.z[rows], select(batch.cond, rows), batch.uncond).to(x.dtype)
        own = (batch.teacher_draw[rows] < self.share)[:, None, None, None]
        return x.index_copy(0, rows, torch.where(own, drawn, x[rows]))

    def _sample(self, x, cond, uncond):
        x = x * self.scheduler.init_noise_sigma
        for t in self.scheduler.timesteps.tolist():
            x_in = x.repeat(copies(self.teacher, [self.guidance]), 1, 1, 1)
            steps = torch.full((len(x),), t, device=x.device)
            o = predict_guided(self.predict, self.teacher, x_in, steps, cond, uncond, [self.guidance]).float()
            if passes([self.guidance]) == 2:
                o_null, o_cond = o.chunk(2)
                o = o_null + self.guidance * (o_cond - o_null)
            x = self.scheduler.step(o, t, x).prev_sample
        return x


class Degradation:
    """Spoils images. `class Mine(Degradation, name="mine")` is `synthetic.degradation = "mine"`; `num_extra_noise` as
    for a Source."""

    num_extra_noise = 0

    def __init_subclass__(cls, name=None, **options):
        super().__init_subclass__(**options)
        if name is not None:
            DEGRADATIONS[name] = cls

    def __init__(self, strength):
        self.strength = strength

    def __call__(self, x, noise):
        """x [N, C, H, W], noise [N, num_extra_noise, C, H, W] -> [N, C, H, W]."""
        raise NotImplementedError


class Blur(Degradation, name="blur"):
    """A Gaussian with a deviation of `strength` latent pixels, cut off at three deviations, edges mirrored."""

    def __call__(self, x, noise):
        """As Degradation's; takes no noise."""
        from torchvision.transforms.functional import gaussian_blur

        radius = min(math.ceil(3 * self.strength), min(x.shape[-2:]) - 1)
        return gaussian_blur(x, [2 * radius + 1] * 2, [float(self.strength)] * 2)


class Noise(Degradation, name="noise"):
    """White noise with a deviation of `strength`; latents have one of about 1."""

    num_extra_noise = 1

    def __call__(self, x, noise):
        """As Degradation's: x + strength noise[:, 0]."""
        return x + self.strength * noise[:, 0]


class Degraded:
    """Another source's images, degraded."""

    def __init__(self, inner, degradation):
        self.inner, self.degradation = inner, degradation
        self.num_extra_noise = inner.num_extra_noise + degradation.num_extra_noise

    def __call__(self, batch):
        """As Source's; the degradation takes the noise that is left."""
        return self.degradation(self.inner(batch), batch.noise[:, self.inner.num_extra_noise:])


def build_source(section: Any, generator: Callable, teacher: Callable, objective: "Objective",
                 lagged: dict[str, Callable], scheduler: Callable, shared: bool = False) -> Callable:
    """What draws the images of one run: a Source, or a wrapper around one that is called alike.

    `section`: the configuration's `synthetic`; `generator`, `teacher`: networks; `lagged`: {kind: network} of the
    copies of the generator that its source draws with; `scheduler()`: a diffusers DDIMScheduler for the teacher;
    `shared`: take the images of the generator's update.
    """
    cls = Shared if shared else SOURCES[section.source]
    network = lagged[cls.copy] if cls.copy else generator
    source: Any = cls(network, objective, **{name: getattr(section, name) for name in cls.options})
    if section.teacher_share:
        guidance = objective.kappa4 if section.teacher_guidance is None else section.teacher_guidance
        source = TeacherShare(source, teacher, objective.predict, scheduler(), section.teacher_share,
                              section.teacher_steps or 50, guidance)
    if section.degradation:
        source = Degraded(source, DEGRADATIONS[section.degradation](section.strength))
    return source


def capture_blocker(section: Any) -> str | None:
    """Why CUDA graphs cannot hold a section's images, or None."""
    return None if SOURCES[section.source].capturable else f"synthetic.source {section.source!r} depends on values"
