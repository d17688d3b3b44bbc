"""The images that train the fake score (method.md, section 7): who draws them, and what is done to them.

A source is a class with a name and one method, `__call__(batch) -> x_g`; a degradation likewise, `__call__(x, noise)`.
To define the class is to make it known to the configuration (docs/ablations.md). Everything random comes with the
batch, so that a source's images do not depend on micro-batches or processes, and resume exactly.
"""

import math

import torch

from sidfast.method.distill import denoise_at, generate
from sidfast.method.guidance import copies, passes, predict_guided

SOURCES, DEGRADATIONS = {}, {}                           # name -> class


class Source:
    """Draws images with a generator's UNet. `class Mine(Source, name="mine")` is `synthetic.source = "mine"`.

    `options`: the keys of the `synthetic` section that it needs, handed to it by name, meaningless elsewhere;
    `copy`: "ema" or "stale" to draw with that copy of the generator, which training keeps up, in place of the generator
    itself; `capturable`: whether a CUDA graph may hold it, i.e. no shape or branch depends on values; `noises`: how
    many tensors of further noise it takes an image.
    """

    options, copy, capturable, noises = (), None, True, 0

    def __init_subclass__(cls, name=None, **options):
        super().__init_subclass__(**options)
        if name is not None:
            SOURCES[name] = cls

    def __init__(self, unet, objective):
        """`unet`: the generator's, or that of its `copy`; `objective`: the run's Objective."""
        self.unet, self.objective = unet, objective

    def generate(self, batch):
        """One-step images [N, C, H, W] of a Batch (eq. 4)."""
        return generate(self.unet, batch.z, batch.text, self.objective)

    def __call__(self, batch):
        """Images x_g [N, C, H, W] in fp32 for a Batch, of which `noise` is [N, noises, C, H, W]; without gradient."""
        raise NotImplementedError


class Generator(Source, name="generator"):
    """The generator as it is."""

    def __call__(self, batch):
        """As Source's: one pass (eq. 4)."""
        return self.generate(batch)


class Shared(Source):
    """The generator's images out of its own update of the same step, in the place of the first noise: one pass less.
    Chosen by `speed.share_generator_forward`. The two updates then see the networks as they were before both."""

    noises = 1

    def __call__(self, batch):
        """As Source's: no pass; x_g is noise[:, 0]."""
        return batch.noise[:, 0]


class Ema(Generator, name="ema"):
    """The generator's average."""

    copy = "ema"


class Stale(Generator, name="stale"):
    """The generator as it was `stale_by` updates ago."""

    copy, options = "stale", ("stale_by", "stale_every")

    def __init__(self, unet, objective, stale_by, stale_every):
        super().__init__(unet, objective)                # (training keeps the copy as old as that)


class MultiStep(Source, name="multistep"):
    """The generator run several times: its image is brought back to a lower noise level with fresh noise, and
    denoised from there. The levels are evenly spaced timesteps from t_init down: for 4 steps t_init times 1, 3/4, 1/2,
    1/4."""

    options = ("steps",)

    def __init__(self, unet, objective, steps):
        super().__init__(unet, objective)
        self.noises = steps - 1
        self.levels = [round(objective.t_init * (steps - i) / steps) for i in range(steps)]

    def __call__(self, batch):
        """As Source's: eq. 4, then eqs. 1 and 2 with noise[:, i] for each further step."""
        x = self.generate(batch)
        for level, eps in zip(self.levels[1:], batch.noise[:, :self.noises].unbind(1), strict=True):
            a, s = self.objective.schedule.coefficients(torch.full((len(x),), level, device=x.device))
            x_t = a[:, None, None, None] * x + s[:, None, None, None] * eps
            x = denoise_at(self.unet, x_t, level, batch.text, self.objective)
        return x


class TeacherShare:
    """Another source's images, of which a share is replaced by the teacher's: DDIM from the same z and text.

    So that shapes depend on no value, the teacher draws as many rows of each batch as the share is of it, rounded up:
    no batch has more rows of its own (`Batches` deals them out evenly).
    """

    def __init__(self, inner, teacher, scheduler, share, steps, guidance):
        """`inner`: the Source; `teacher`: the teacher's UNet; `scheduler`: a diffusers DDIMScheduler, run for `steps`
        steps; `share`: the probability of each image; `guidance`: kappa of eq. 3."""
        self.inner, self.teacher, self.scheduler = inner, teacher, scheduler
        self.share, self.guidance, self.noises = share, guidance, inner.noises
        scheduler.set_timesteps(steps)

    def __call__(self, batch):
        """As Source's; rows with chance < share are the teacher's."""
        x = self.inner(batch)
        rows = batch.chance.argsort()[:math.ceil(self.share * len(x) - 1e-9)]
        drawn = self._sample(batch.z[rows], batch.text[rows], batch.null).to(x.dtype)
        own = (batch.chance[rows] < self.share)[:, None, None, None]
        return x.index_copy(0, rows, torch.where(own, drawn, x[rows]))

    def _sample(self, x, text, null):
        x = x * self.scheduler.init_noise_sigma
        for t in self.scheduler.timesteps.tolist():
            x_in = x.repeat(copies(self.teacher, [self.guidance]), 1, 1, 1)
            steps = torch.full((len(x),), t, device=x.device)
            o = predict_guided(self.teacher, x_in, steps, text, null, [self.guidance]).float()
            if passes([self.guidance]) == 2:
                o_null, o_cond = o.chunk(2)
                o = o_null + self.guidance * (o_cond - o_null)
            x = self.scheduler.step(o, t, x).prev_sample
        return x


class Degradation:
    """Spoils images. `class Mine(Degradation, name="mine")` is `synthetic.degradation = "mine"`; `noises` as for a
    Source."""

    noises = 0

    def __init_subclass__(cls, name=None, **options):
        super().__init_subclass__(**options)
        if name is not None:
            DEGRADATIONS[name] = cls

    def __init__(self, strength):
        self.strength = strength

    def __call__(self, x, noise):
        """x [N, C, H, W], noise [N, noises, C, H, W] -> [N, C, H, W]."""
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

    noises = 1

    def __call__(self, x, noise):
        """As Degradation's: x + strength noise[:, 0]."""
        return x + self.strength * noise[:, 0]


class Degraded:
    """Another source's images, degraded."""

    def __init__(self, inner, degradation):
        self.inner, self.degradation = inner, degradation
        self.noises = inner.noises + degradation.noises

    def __call__(self, batch):
        """As Source's; the degradation takes the noise that is left."""
        return self.degradation(self.inner(batch), batch.noise[:, self.inner.noises:])


def build_source(section, networks, objective, copies, scheduler, shared=False):
    """What draws the images of one run: a Source, or what stands around one and is called alike.

    `section`: the configuration's `synthetic`; `copies`: {kind: UNet} of the copies that its source draws with;
    `scheduler()`: a diffusers DDIMScheduler for the teacher; `shared`: take the images of the generator's update.
    """
    cls = Shared if shared else SOURCES[section.source]
    unet = copies[cls.copy] if cls.copy else networks.generator.module.denoiser
    source = cls(unet, objective, **{name: getattr(section, name) for name in cls.options})
    if section.teacher_share:
        guidance = objective.kappa4 if section.teacher_guidance is None else section.teacher_guidance
        source = TeacherShare(source, networks.teacher, scheduler(), section.teacher_share, section.teacher_steps or 50,
                              guidance)
    if section.degradation:
        source = Degraded(source, DEGRADATIONS[section.degradation](section.strength))
    return source


def capture_blocker(section):
    """Why CUDA graphs cannot hold a section's images, or None."""
    return None if SOURCES[section.source].capturable else f"synthetic.source {section.source!r} depends on values"
