"""The distributions that noise levels are drawn from (method.md, section 6).

A distribution lives on ln sigma and has two methods, `icdf (of u in [0, 1]) and `cdf_range` (the u's of a range);
`Truncated` restricts one to the teacher's range with them. So every draw is one uniform number put through a monotone
function: no rejection, and the same numbers give the same levels however a batch is split. To define a distribution's
class is to make it known to the configuration (docs/ablations.md).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from sidfast.method.schedule import Schedule

DENSITIES: dict[str, type["Density"]] = {}               # name -> class (method.md, section 6)


class Density:
    """A distribution of ln sigma. `class Mine(Density, name="mine")` is `noise.density = "mine"`.

    `options`: the keys of the configuration's `noise` section that it takes, all with defaults.
    """

    options: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, name=None, **options):
        super().__init_subclass__(**options)
        if name is not None:
            DENSITIES[name] = cls

    @classmethod
    def for_schedule(cls, schedule: Schedule, low: float, high: float, **options) -> "Density":
        """The distribution for a teacher: its Schedule, and the range [low, high] of ln sigma (numbers) that will
        be drawn from. `options`: those of the class that were given."""
        return cls(**options)

    def icdf(self, u: torch.Tensor) -> torch.Tensor:
        """u uniform in [0, 1], float64, any shape -> ln sigma, float64, of that shape, rising with u."""
        raise NotImplementedError

    def cdf_range(self, low: float, high: float) -> tuple[float, ...]:
        """(start, end): the u's in [0, 1] of ln sigma = low and high (numbers), by the inverse of `icdf."""
        raise NotImplementedError


@dataclass(frozen=True)
class Normal(Density, name="edm"):
    """ln sigma ~ N(mean, std^2): EDM's training noise (arXiv 2206.00364)."""

    options: ClassVar[tuple[str, ...]] = ("mean", "std")

    mean: float = -1.2
    std: float = 1.2

    def icdf(self, u: torch.Tensor) -> torch.Tensor:
        """ln sigma = mean + std Phi^-1(u) (section 6, `edm`)."""
        return self.mean + self.std * torch.special.ndtri(u)

    def cdf_range(self, low: float, high: float) -> tuple[float, ...]:
        """Phi((ln sigma - mean) / std) of both ends."""
        return tuple(0.5 * math.erfc((self.mean - v) / self.std / math.sqrt(2)) for v in (low, high))


class LogitNormal(Normal, name="logit_normal"):
    """sigma = shift u / (1 - u), u = sigmoid(N(0, 1)) (arXiv 2403.03206): ln sigma ~ N(ln shift, 1)."""

    options = ("shift",)

    def __init__(self, shift=1.0):
        """`shift`: a factor on sigma. Raises ValueError unless it is above 0."""
        super().__init__(math.log(shift), 1.0)


@dataclass(frozen=True)
class Laplace(Density, name="laplace"):
    """logSNR = -2 ln sigma ~ Laplace(mean, scale) (arXiv 2407.03297)."""

    options = ("mean", "scale")

    mean: float = 0.0
    scale: float = 0.5

    def icdf(self, u: torch.Tensor) -> torch.Tensor:
        """-1/2 times the quantile of logSNR at 1 - u (section 6, `laplace`)."""
        v = u - 0.5                                      # -logSNR ~ Laplace(-mean, scale)
        return 0.5 * (-self.mean - self.scale * torch.sign(v) * torch.log1p(-2 * v.abs()))

    def cdf_range(self, low: float, high: float) -> tuple[float, ...]:
        """The distribution function of ln sigma at both ends."""
        return tuple(self._cdf(v) for v in (low, high))

    def _cdf(self, log_sigma):
        x = (2 * log_sigma + self.mean) / self.scale
        return 0.5 * math.exp(x) if x < 0 else 1 - 0.5 * math.exp(-x)


@dataclass(frozen=True)
class Karras(Density, name="karras"):
    """sigma = (smax^(1/rho) + u (smin^(1/rho) - smax^(1/rho)))^rho, u uniform (arXiv 2206.00364, eq. 5); its range is
    its own, so nothing is left to truncate."""

    options = ("rho",)

    log_sigma_min: float
    log_sigma_max: float
    rho: float = 7.0

    @classmethod
    def for_schedule(cls, schedule: Schedule, low: float, high: float, **options) -> "Karras":
        """Between low and high (ln smin and ln smax)."""
        return cls(low, high, **options)

    def icdf(self, u: torch.Tensor) -> torch.Tensor:
        """The formula of section 6 (`karras`) at 1 - u, so that it rises with u."""
        low, high = math.exp(self.log_sigma_min / self.rho), math.exp(self.log_sigma_max / self.rho)
        return self.rho * torch.log(low + u * (high - low))

    def cdf_range(self, low: float, high: float) -> tuple[float, ...]:
        """(0, 1), whatever the range."""
        return 0.0, 1.0


@dataclass(frozen=True)
class Cosine(Density, name="cosine"):
    """sigma = tan(pi/2 (u + 0.008) / 1.008), u uniform (arXiv 2102.09672)."""

    offset: float = 0.008

    def icdf(self, u: torch.Tensor) -> torch.Tensor:
        """The logarithm of section 6's formula (`cosine`)."""
        return torch.tan(math.pi / 2 * (u + self.offset) / (1 + self.offset)).log()

    def cdf_range(self, low: float, high: float) -> tuple[float, ...]:
        """u = (1 + offset) 2/pi atan(sigma) - offset of both ends, cut off to [0, 1]."""
        angle = (math.atan(math.exp(v)) * 2 / math.pi for v in (low, high))
        return tuple(min(max(v * (1 + self.offset) - self.offset, 0.0), 1.0) for v in angle)


@dataclass(frozen=True)
class Sigmoid(Density, name="sigmoid"):
    """a^2 = (g(end) - g(start + u (end - start))) / (g(end) - g(start)), g(x) = sigmoid(x / tau), u uniform
    (arXiv 2212.11972)."""

    start: float = -3.0
    end: float = 3.0
    tau: float = 1.0

    def _g(self, x):
        return 1 / (1 + math.exp(-x / self.tau))

    def icdf(self, u: torch.Tensor) -> torch.Tensor:
        """ln sigma = ln((1 - a^2) / a^2) / 2, with a^2 from section 6's schedule (`sigmoid`) at u."""
        g = torch.sigmoid((self.start + u * (self.end - self.start)) / self.tau)
        return 0.5 * ((g - self._g(self.start)) / (self._g(self.end) - g)).log()

    def cdf_range(self, low: float, high: float) -> tuple[float, ...]:
        """The u at which the schedule has a^2 = 1 / (1 + sigma^2), of both ends."""
        return tuple(self._cdf(v) for v in (low, high))

    def _cdf(self, log_sigma):
        s2 = 1 / (1 + math.exp(-2 * log_sigma))          # s^2 = 1 - a^2
        g = self._g(self.start) + s2 * (self._g(self.end) - self._g(self.start))
        return (self.tau * math.log(g / (1 - g)) - self.start) / (self.end - self.start)


class Grid(Density):
    """Uniform over given levels: the teacher's own timesteps, or another schedule's."""

    def __init__(self, log_sigma):
        """`log_sigma`: rising ln sigma [K], float64."""
        self.log_sigma = log_sigma

    def icdf(self, u: torch.Tensor) -> torch.Tensor:
        """Level number floor(K u); for u = 1 the last."""
        index = (u * len(self.log_sigma)).long().clamp(0, len(self.log_sigma) - 1)
        return self.log_sigma.to(u.device)[index]

    def cdf_range(self, low: float, high: float) -> tuple[float, ...]:
        """(i / K, (j + 1) / K), i and j the first and the last level in [low, high]. Raises ValueError if there are
        none."""
        inside = (self.log_sigma >= low) & (self.log_sigma <= high)
        index = inside.nonzero().flatten().tolist()
        if not index:
            raise ValueError("no level of the grid lies in the range")
        return index[0] / len(self.log_sigma), (index[-1] + 1) / len(self.log_sigma)


class Ddpm(Grid, name="ddpm"):
    """The teacher's own timesteps, all equally likely: the paper's (section 6, `ddpm`)."""

    @classmethod
    def for_schedule(cls, schedule: Schedule, low: float, high: float) -> "Ddpm":
        """Over the teacher's grid; no options."""
        return cls(schedule.log_sigma(torch.arange(len(schedule))))


class Linear(Grid, name="linear"):
    """The timesteps of DDPM's original schedule (arXiv 2006.11239), all equally likely (section 6, `linear`)."""

    @classmethod
    def for_schedule(cls, schedule: Schedule, low: float, high: float) -> "Linear":
        """Over DDPM's grid, whatever the teacher's; no options."""
        a2 = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
        return cls(0.5 * ((1 - a2) / a2).log())


@dataclass(frozen=True)
class Truncated:
    """A distribution restricted to ln sigma in [low, high] (numbers).

    Raises ValueError if less than 1e-6 of it lies there.
    """

    distribution: Density
    low: float
    high: float

    def __post_init__(self):
        start, end = self.distribution.cdf_range(self.low, self.high)
        if end - start < 1e-6:
            raise ValueError("the noise levels of this density lie outside of the teacher's range")

    def icdf(self, u: torch.Tensor) -> torch.Tensor:
        """As Density's, of what is left: the whole's quantile at start + u (end - start), (start, end) its
        `cdf_range`."""
        start, end = self.distribution.cdf_range(self.low, self.high)
        return self.distribution.icdf(start + u * (end - start)).clamp(self.low, self.high)


class NoiseLevels:
    """Random timesteps of a named density, truncated to [sigma(t_min), sigma(t_max)] of a teacher's schedule
    (method.md, section 6)."""

    def __init__(self, schedule, density="ddpm", t_min=20, t_max=979, **options):
        """`density`: a key of DENSITIES; t_min, t_max: timesteps on the grid; `options`: the density's own.

        Raises ValueError if the teacher has no timestep t_max, or the density (next to) nothing in the range, or none
        that is finite.
        """
        if t_max >= len(schedule):
            raise ValueError(f"noise.t_max ({t_max}) must be below the teacher's {len(schedule)} timesteps")
        low, high = schedule.log_sigma(t_min).item(), schedule.log_sigma(t_max).item()
        distribution = DENSITIES[density].for_schedule(schedule, low, high, **options)
        self.schedule, self.distribution = schedule, Truncated(distribution, low, high)
        if not self.distribution.icdf(torch.tensor(0.5, dtype=torch.float64)).isfinite():
            raise ValueError(f"noise.t_max ({t_max}) has no signal (zero terminal SNR), and density {density!r} needs "
                             "a finite range: take a smaller one")

    def sample(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """n timesteps t [n] in [t_min, t_max] (float64, fractional in general) on the generator's device."""
        u = torch.rand(n, generator=generator, device=generator.device, dtype=torch.float64)
        return self.schedule.timestep(self.distribution.icdf(u))
