"""The method once more, slowly and in float64, straight from method.md: loops over samples, no code of sidfast's.

Beside it stand-ins for the networks and for the DeepSpeed engine, and a comparison that names what is off.
"""

import copy
from typing import NamedTuple

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from sidfast.engines.module import EngineModule
from sidfast.engines.update import Networks
from sidfast.method.conditions import split
from sidfast.method.updates import Batch, Objective
from sidfast.teachers.paths import DiscreteBetas
from sidfast.teachers.sd import StableDiffusion

PREDICTION_TYPES = ("epsilon", "v_prediction")
KAPPAS = {
    "none": (1, 1, 1, 1),
    "teacher": (1, 1, 1, 4.5),
    "long-short": (1.5, 1.5, 1.5, 1.5),
    "zero": (0, 0, 0, 1),
    "anti": (-1, -1, -1, 1),
    "unequal": (2.0, 0.5, -0.25, 3.0),
    "unequal-0-1": (0.5, 0, 1, 0),
}                                                        # kappa1 .. kappa4
ALPHAS = (1.0, 0.5, 1.2)

for_prediction_types = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
for_kappas = pytest.mark.parametrize("kappas", KAPPAS.values(), ids=KAPPAS)
for_alphas = pytest.mark.parametrize("alpha", ALPHAS, ids="alpha={}".format)

BOUND = 1e-5                                             # relative norm error of fp32 against float64
TEXT, TEXT_WIDTH = "encoder_hidden_states", 6
POISON = TEXT_WIDTH - 1                                  # the text channel that only a poisoned network reads

ALPHAS_CUMPROD = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)        # Stable Diffusion's a_t^2
LOG_SIGMA = 0.5 * np.log((1 - ALPHAS_CUMPROD) / ALPHAS_CUMPROD)


def assert_close(name, got, want, bound=BOUND):
    """Relative norm error of `got` against `want`."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
    want = want.double()
    size = want.norm()
    assert size > 0, f"{name}: the reference is zero everywhere and shows nothing"
    error = ((got.double() - want).norm() / size).item()
    assert error <= bound, f"{name}: {error:.1e} > {bound:.1e}"


# Noise levels (section 1)


def log_sigma_at(t):
    """ln sigma of timesteps, whole or fractional (numpy, float64)."""
    return np.interp(np.asarray(t, np.float64), np.arange(1000), LOG_SIGMA)


def a_and_s(t):
    """a and s of one timestep as Python floats."""
    sigma = float(np.exp(log_sigma_at(float(t))))
    return (1 + sigma**2) ** -0.5, sigma * (1 + sigma**2) ** -0.5


# Equations 2 to 8 for one sample: o and x are [C, H, W], a and s numbers


def naive_x_hat(prediction_type, x_t, o, a, s):
    """Eq. 2, by solving x_t = a x + s eps for x."""
    if prediction_type == "epsilon":
        return (x_t - s * o) / a
    assert prediction_type == "v_prediction"
    return a * x_t - s * o


def naive_guided(o_null, o_cond, kappa):
    """Eq. 3."""
    return (1 - kappa) * o_null + kappa * o_cond


def naive_generator_loss(x_g, y_real, y_2, y_3, alpha):
    """Eqs. 7 and 8."""
    omega = 1 / max((x_g - y_real).detach().abs().mean().item(), 1e-5)
    return omega * ((1 - alpha) * (y_real - y_2) ** 2 + (y_real - y_2) * (y_3 - x_g)).sum()


def naive_fake_score_loss(prediction_type, o, x_g, eps, a, s):
    """Eq. 5."""
    if prediction_type == "epsilon":
        target, w = eps, 1.0
    else:
        snr = (a / s) ** 2
        target, w = a * eps - s * x_g, snr / (snr + 1)
    return w * (o - target).square().sum()


# The two updates for whole networks. Networks and batch are in float64; every pass is a single sample.


def naive_pass(network, x, t, text):
    """One pass for one sample: x [C, H, W], t a number, text [L, D]."""
    t = torch.tensor([float(t)], dtype=torch.float64)
    return network(x[None], t, encoder_hidden_states=text[None], return_dict=False)[0][0]


def naive_guided_pass(network, x_t, t, text, null, kappa):
    return naive_guided(naive_pass(network, x_t, t, null), naive_pass(network, x_t, t, text), kappa)


def naive_generate(generator, z, text, objective):
    """Eq. 4."""
    a, s = a_and_s(objective.t_init)
    output = naive_pass(generator, s * z, objective.t_init, text)
    return naive_x_hat(objective.schedule.prediction_type, s * z, output, a, s)


def naive_generator_update(networks, batch, objective, skip=()):
    """The mean over samples of eq. 8, samples in `skip` counting as 0. Returns (loss, {name: gradient})."""
    generator, fake_score, teacher = networks
    total = 0.0
    for n in range(len(batch.z)):
        if n in skip:
            continue
        t, text, null = batch.t[n].item(), batch.cond[TEXT][n], batch.uncond[TEXT][0]
        kind = objective.schedule.prediction_type
        a, s = a_and_s(t)
        x_g = naive_generate(generator, batch.z[n], text, objective)
        x_t = a * x_g + s * batch.eps[n]
        y_real, y_2, y_3 = (
            naive_x_hat(kind, x_t, naive_guided_pass(network, x_t, t, text, null, kappa), a, s)
            for network, kappa in ((teacher, objective.kappa4), (fake_score, objective.kappa2),
                                   (fake_score, objective.kappa3)))
        total = total + naive_generator_loss(x_g, y_real, y_2, y_3, objective.alpha)
    return gradients(total / len(batch.z), generator)


def naive_fake_score_update(networks, batch, objective, skip=()):
    """The mean over samples of eq. 5, samples in `skip` counting as 0. Returns (loss, {name: gradient})."""
    generator, fake_score, _ = networks
    total = 0.0
    for n in range(len(batch.z)):
        if n in skip:
            continue
        t = batch.t[n].item()
        a, s = a_and_s(t)
        with torch.no_grad():
            x_g = naive_generate(generator, batch.z[n], batch.cond[TEXT][n], objective)
        text = batch.uncond[TEXT][0] if batch.dropped[n] else batch.cond[TEXT][n]
        output = naive_guided_pass(fake_score, a * x_g + s * batch.eps[n], t, text, batch.uncond[TEXT][0],
                                   objective.kappa1)
        total = total + naive_fake_score_loss(objective.schedule.prediction_type, output, x_g, batch.eps[n], a, s)
    return gradients(total / len(batch.z), fake_score)


def gradients(loss, module):
    """A loss, and its gradient in every parameter of a module (zeros where it has none)."""
    names, parameters = zip(*module.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    pairs = zip(names, parameters, grads, strict=True)
    return loss.detach(), {name: torch.zeros_like(p) if g is None else g for name, p, g in pairs}


# Stand-ins


class TinyUNet(nn.Module):
    """A network with a UNet's signature whose output depends on x, t and text, and on each of its parameters.

    It reads the text channel POISON only if poisoned: a sample with a large number there then overflows inside.
    """

    def __init__(self, seed, poisoned=False, channels=4, width=8):
        super().__init__()
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        self.time = nn.Linear(4, width)
        self.text = nn.Linear(TEXT_WIDTH, width)
        self.conv_mid = nn.Conv2d(width, width, 3, padding=1)
        self.conv_out = nn.Conv2d(width, channels, 3, padding=1)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / max(1, p[0].numel()) ** 0.5)
            self.text.weight[:, POISON] = 10.0 if poisoned else 0.0

    def forward(self, x, t, encoder_hidden_states, return_dict=True):
        assert not return_dict
        t = t.to(x.dtype)[:, None] / 1000
        time = self.time(torch.cat([t.sin(), t.cos(), (7 * t).sin(), (7 * t).cos()], 1))
        words = self.text(encoder_hidden_states).mean(1)
        h = self.conv_in(x) * (1 + words[:, :, None, None]) + time[:, :, None, None]
        h = h + self.conv_mid(nn.functional.silu(h))
        return (self.conv_out(nn.functional.silu(h)),)


class Engine:
    """What the updates need of a DeepSpeed engine. Like DeepSpeed it divides the loss by the accumulation steps."""

    def __init__(self, unet, accumulation=1, flat=False):
        self.module, self.accumulation = EngineModule(unet, flat), accumulation
        self.passes = self.backwards = self.steps = 0

    def __call__(self, compute, *tensors):
        self.passes += 1
        return self.module(compute, *tensors)

    def backward(self, loss):
        self.backwards += 1
        (loss / self.accumulation).backward()

    def step(self):
        self.steps += 1

    def gradients(self):
        """{name: gradient}; raises if a parameter has none."""
        flat = self.module.flat
        return {name: g.clone() for name, g in (flat.named([c.grad for c in flat.buckets]) if flat else [
            (name, p.grad) for name, p in self.module.network.named_parameters()])}


class Setting(NamedTuple):
    """The same networks and batch twice: for sidfast in fp32, and for the naive evaluation in float64."""

    networks: Networks
    batch: Batch
    networks64: tuple
    batch64: Batch


def objective_of(kappa1=1.0, kappa2=1.0, kappa3=1.0, kappa4=1.0, alpha=1.0, prediction_type="epsilon", t_init=625):
    """An Objective on Stable Diffusion's noise schedule."""
    schedule = DiscreteBetas(ALPHAS_CUMPROD, prediction_type)
    return Objective(schedule, StableDiffusion().predict, kappa1, kappa2, kappa3, kappa4, alpha, t_init)


def random_batch(n, seed=0, shape=(4, 5, 3), words=3, text_width=TEXT_WIDTH, num_extra_noise=0):
    """A batch in fp32 with whole and fractional timesteps over the whole range, and a dropped prompt (if n > 1)."""
    g = torch.Generator().manual_seed(seed)
    text, null = (torch.randn(rows, words, text_width, generator=g) for rows in (n, 1))
    text[..., -1], null[..., -1] = 0.0, 0.0              # the channel POISON
    z, eps = (torch.randn(n, *shape, generator=g) for _ in range(2))
    t = torch.linspace(20, 979, n + 2, dtype=torch.float64)[1:-1]
    t[::2] = t[::2].round()
    noise = torch.randn(n, num_extra_noise, *shape, generator=g)
    return Batch({TEXT: text}, {TEXT: null}, z, eps, t, torch.arange(n) == 1, noise, torch.rand(n, generator=g))


def in_float64(batch):
    return batch.with_tensors([v.double() if v.is_floating_point() else v for v in batch.tensors()])


def setting(n=5, poisoned=(), make=TinyUNet, accumulation=1, flat=False, **batch_options):
    """Three different networks (those named in `poisoned` are), and a batch."""
    modules = {name: make(seed, name in poisoned) for seed, name in enumerate(Networks._fields)}
    modules["teacher"].requires_grad_(False)
    copies = tuple(copy.deepcopy(m).double() for m in modules.values())
    engines = {name: Engine(modules[name], accumulation, flat) for name in ("generator", "fake_score")}
    batch = random_batch(n, **batch_options)
    return Setting(Networks(**engines, teacher=modules["teacher"]), batch, copies, in_float64(batch))


def micro_batches(batch, size):
    """The same batch in pieces of `size`."""
    rows = zip(split(batch.cond, size), *(v.split(size) for v in batch[2:]), strict=True)
    return [Batch(cond, batch.uncond, *rest) for cond, *rest in rows]


def small_unet(seed, _):
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(8,), layers_per_block=1, cross_attention_dim=8, attention_head_dim=4, norm_num_groups=4)


def poison(batch, *samples):
    """The batch with these samples' text such that a poisoned network overflows in them."""
    for sample in samples:
        batch.cond[TEXT][sample, :, POISON] = 3e38
    return batch
