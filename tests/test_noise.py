"""Noise levels: the teacher's schedule, and the densities of method.md, section 6, against rejection sampling."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from helpers_method import ALPHAS_CUMPROD, LOG_SIGMA, log_sigma_at
from scipy import stats

from sidfast.method.densities import DENSITIES, NoiseLevels
from sidfast.teachers.paths import DiscreteBetas

SCHEDULE = DiscreteBetas(ALPHAS_CUMPROD)
DRAWS = 50_000
KS_BOUND = 0.012                                         # of two samples of 50,000: exceeded by chance once in 700


# The schedule (section 1)


@pytest.mark.parametrize("betas", ({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
                                   {"beta_schedule": "linear"}, {"beta_schedule": "squaredcos_cap_v2"}),
                         ids=lambda v: v["beta_schedule"])
def test_coefficients_are_those_of_diffusers(betas):
    scheduler = DDPMScheduler(**betas)
    t = torch.arange(1000)
    a, s = DiscreteBetas(scheduler.alphas_cumprod).coefficients(t)
    x = scheduler.add_noise(torch.ones(1000, 1, dtype=torch.float64), torch.zeros(1000, 1), t)[:, 0]
    eps = scheduler.add_noise(torch.zeros(1000, 1), torch.ones(1000, 1, dtype=torch.float64), t)[:, 0]
    assert a.dtype == s.dtype == torch.float32
    torch.testing.assert_close(a.double(), x, rtol=1e-6, atol=0, check_dtype=False)
    torch.testing.assert_close(s.double(), eps, rtol=1e-4, atol=0, check_dtype=False)
    # (diffusers rounds alphas_cumprod to float32 and takes 1 - alpha from that: s is only so exact at small t)


def test_whole_timesteps_of_any_type():
    """From a table, to the bit what interpolation gives."""
    t = torch.tensor([0, 1, 77, 100])
    for kind in (torch.int64, torch.int32, torch.int8, torch.uint8):
        for got, want in zip(SCHEDULE.coefficients(t.to(kind)), SCHEDULE.coefficients(t.double()), strict=True):
            assert torch.equal(got, want)
    elsewhere = SCHEDULE.to("meta")
    assert all(v.device.type == "meta" for v in elsewhere.coefficients(t.to("meta")))


def test_coefficients_have_unit_variance_between_grid_points():
    t = torch.linspace(0, 999, 5001, dtype=torch.float64)
    a, s = SCHEDULE.coefficients(t)
    torch.testing.assert_close(a**2 + s**2, torch.ones_like(a), rtol=1e-6, atol=0)
    np.testing.assert_allclose(torch.log(s.double() / a.double()), log_sigma_at(t), rtol=0, atol=1e-6)


def test_log_sigma_is_linear_between_grid_points():
    t = torch.tensor([0.0, 0.25, 19.5, 624.75, 998.999, 999.0], dtype=torch.float64)
    np.testing.assert_allclose(SCHEDULE.log_sigma(t), log_sigma_at(t), rtol=0, atol=1e-12)


def test_timestep_of_grid_points_is_exact():
    t = torch.arange(1000)
    assert torch.equal(SCHEDULE.timestep(SCHEDULE.log_sigma(t)), t.double())


def test_timestep_inverts_log_sigma():
    t = torch.rand(100, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 999
    torch.testing.assert_close(SCHEDULE.timestep(SCHEDULE.log_sigma(t)), t, rtol=0, atol=1e-8)


def test_timestep_stays_on_the_grid():
    beyond = torch.tensor([LOG_SIGMA[0] - 1, LOG_SIGMA[-1] + 1])
    assert SCHEDULE.timestep(beyond).tolist() == [0.0, 999.0]


# The densities (section 6). Each law draws n values of ln sigma with numpy, before truncation.


def law_ddpm(rng, n, low, high):
    return rng.choice(LOG_SIGMA, n)


def law_edm(rng, n, low, high, mean=-1.2, std=1.2):
    return rng.normal(mean, std, n)


def law_karras(rng, n, low, high, rho=7):
    smin, smax = np.exp(low), np.exp(high)
    return np.log((smax ** (1 / rho) + rng.uniform(size=n) * (smin ** (1 / rho) - smax ** (1 / rho))) ** rho)


def law_cosine(rng, n, low, high):
    return np.log(np.tan(np.pi / 2 * (rng.uniform(size=n) + 0.008) / 1.008))


def law_linear(rng, n, low, high):
    alphas = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    return rng.choice(np.log(np.sqrt(1 - alphas) / np.sqrt(alphas)), n)


def law_sigmoid(rng, n, low, high):
    def sigmoid(v):
        return 1 / (1 + np.exp(-v))

    a2 = (sigmoid(3.0) - sigmoid(-3.0 + rng.uniform(size=n) * 6)) / (sigmoid(3.0) - sigmoid(-3.0))
    return 0.5 * np.log((1 - a2) / a2)


def law_laplace(rng, n, low, high, mean=0.0, scale=0.5):
    return -0.5 * rng.laplace(mean, scale, n)


def law_logit_normal(rng, n, low, high, shift=1.0):
    u = 1 / (1 + np.exp(-rng.normal(size=n)))
    u = shift * u / (1 + (shift - 1) * u)                # Stable Diffusion 3's timestep shift
    return np.log(u / (1 - u))


LAWS = {name: globals()[f"law_{name}"] for name in DENSITIES}
RANGES = {"default": (20, 979), "narrow": (300, 620), "whole": (0, 999)}
OPTIONS = {
    "edm": {"mean": 0.4, "std": 0.5}, "edm-mean": {"mean": 0.4}, "edm-std": {"std": 0.5},
    "karras": {"rho": 2.5},
    "laplace": {"mean": 1.5, "scale": 0.25}, "laplace-mean": {"mean": 1.5}, "laplace-scale": {"scale": 0.25},
    "logit_normal": {"shift": 3.0},
}


def draw(density, t_min=20, t_max=979, seed=0, n=DRAWS, **options):
    return NoiseLevels(SCHEDULE, density, t_min, t_max, **options).sample(n, torch.Generator().manual_seed(seed))


def rejected(density, t_min=20, t_max=979, **options):
    """DRAWS values of ln sigma from the law, those outside the range thrown away."""
    rng, low, high = np.random.default_rng(1), LOG_SIGMA[t_min], LOG_SIGMA[t_max]
    kept = np.empty(0)
    while len(kept) < DRAWS:
        values = LAWS[density](rng, 2 * DRAWS, low, high, **options)
        kept = np.concatenate([kept, values[(values >= low - 1e-12) & (values <= high + 1e-12)]])
    return kept[:DRAWS]


def distance(t, log_sigma):
    # rounded, since equal levels of a grid must be equal to the last bit
    return stats.ks_2samp(np.round(log_sigma_at(t), 9), np.round(log_sigma, 9)).statistic


def test_every_density_has_a_law():
    assert set(LAWS) == {"ddpm", "edm", "karras", "cosine", "linear", "sigmoid", "laplace", "logit_normal"}


@pytest.mark.parametrize("t_range", RANGES.values(), ids=RANGES)
@pytest.mark.parametrize("density", LAWS)
def test_density(density, t_range):
    t = draw(density, *t_range)
    assert t.shape == (DRAWS,) and t.dtype == torch.float64
    assert t_range[0] <= t.min() and t.max() <= t_range[1]
    assert distance(t, rejected(density, *t_range)) < KS_BOUND


@pytest.mark.parametrize("name", OPTIONS)
def test_options_take_effect(name):
    density, options = name.split("-")[0], OPTIONS[name]
    t = draw(density, **options)
    assert t.min() >= 20 and t.max() <= 979
    assert distance(t, rejected(density, **options)) < KS_BOUND
    assert distance(t, rejected(density)) > 5 * KS_BOUND


def test_every_option_is_tested():
    assert {(name.split("-")[0], option) for name, options in OPTIONS.items() for option in options} == {
        (density, option) for density, law in DENSITIES.items() for option in law.options}


LOW, HIGH = LOG_SIGMA[20], LOG_SIGMA[979]
TAILS = {
    "edm-below": ("edm", {"mean": -4.5, "std": 0.3}),
    "edm-above": ("edm", {"mean": 6.0, "std": 0.3}),
    "laplace-below": ("laplace", {"mean": 12.0, "scale": 0.2}),
}


@pytest.mark.parametrize("density, options", TAILS.values(), ids=TAILS)
def test_truncation_far_in_a_tail(density, options):
    """A range that holds next to none of the law's mass is refused."""
    with pytest.raises(ValueError, match="outside of the teacher's range"):
        draw(density, n=10, **options)


def test_densities_differ():
    medians = {name: draw(name).median().item() for name in LAWS}
    assert len({round(m, 1) for m in medians.values()}) == len(LAWS), medians


@pytest.mark.parametrize("t_range", RANGES.values(), ids=RANGES)
def test_ddpm_is_uniform_over_whole_timesteps(t_range):
    t_min, t_max = t_range
    t = draw("ddpm", t_min, t_max, n=200_000)
    assert torch.equal(t, t.round())
    counts = torch.bincount(t.long(), minlength=1000)[t_min:t_max + 1]
    assert counts.sum() == len(t) and counts.min() > 0
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_ddpm_reaches_both_ends_of_a_short_range():
    t = draw("ddpm", 500, 502, n=3000)
    assert sorted(set(t.tolist())) == [500.0, 501.0, 502.0]


@pytest.mark.parametrize("density", LAWS)
def test_draws_follow_the_generator(density):
    assert torch.equal(draw(density, n=100), draw(density, n=100))
    assert not torch.equal(draw(density, n=100), draw(density, n=100, seed=1))


@pytest.mark.parametrize("density", LAWS)
def test_splitting_a_draw_changes_nothing(density):
    generator = torch.Generator().manual_seed(0)
    levels = NoiseLevels(SCHEDULE, density)
    parts = torch.cat([levels.sample(n, generator) for n in (64, 32, 4)])
    assert torch.equal(parts, draw(density, n=100))
