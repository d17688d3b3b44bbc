"""The paths from image to noise that teachers have (method.md, sections 1 and 10), as the method's Schedule."""

import torch

PREDICTION_TYPES = ("epsilon", "v_prediction")


class DiscreteBetas:
    """A variance-preserving path (a^2 + s^2 = 1) given on a grid of T timesteps, as Stable Diffusion has it. Between
    grid points ln sigma is linear in t."""

    def __init__(self, alphas_cumprod, prediction_type: str = "epsilon"):
        """`alphas_cumprod`: a_t^2 for t = 0 .. T-1 [T], falling. Raises ValueError for a prediction type that is not
        one of PREDICTION_TYPES."""
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction type {prediction_type!r} is not one of {', '.join(PREDICTION_TYPES)}")
        alphas = torch.as_tensor(alphas_cumprod, dtype=torch.float64).cpu()
        self.prediction_type = prediction_type
        self._table = 0.5 * ((1 - alphas) / alphas).log()                    # ln sigma [T], rising, float64
        self._on_grid = _coefficients(self._table)

    def __len__(self):
        return len(self._table)

    def to(self, device: torch.device | str) -> "DiscreteBetas":
        """As Schedule's."""
        other = object.__new__(DiscreteBetas)
        other.prediction_type, other._table = self.prediction_type, self._table.to(device)
        other._on_grid = tuple(v.to(device) for v in self._on_grid)
        return other

    def log_sigma(self, t: torch.Tensor | float) -> torch.Tensor:
        """As Schedule's, for t in [0, T-1] of any shape."""
        t = torch.as_tensor(t, dtype=torch.float64, device=self._table.device)
        low = t.long().clamp(0, len(self) - 2)
        between = torch.lerp(self._table[low], self._table[low + 1], t - low)
        return torch.where(t == t.round(), self._table[t.round().long()], between)         # the last may be infinite

    def timestep(self, log_sigma: torch.Tensor) -> torch.Tensor:
        """As Schedule's, any shape; levels on the grid give whole numbers, those beyond its ends the ends."""
        high = torch.searchsorted(self._table, log_sigma.contiguous()).clamp(1, len(self) - 1)
        below, above = self._table[high - 1], self._table[high]
        between = ((log_sigma - below) / (above - below)).clamp(0, 1)
        return high - 1 + torch.where(log_sigma == above, 1, between)            # (above may be infinite)

    def coefficients(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As Schedule's: a = 1 / sqrt(1 + sigma^2), s = sigma a."""
        if t.is_floating_point():
            return _coefficients(self.log_sigma(t))
        a, s = self._on_grid                             # (interpolating takes two dozen launches)
        return a[t.long()], s[t.long()]

    def to_x0(self, a: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As Schedule's."""
        return (1 / a, -s / a) if self.prediction_type == "epsilon" else (a, -s)

    def target(self, x: torch.Tensor, eps: torch.Tensor, a: torch.Tensor, s: torch.Tensor
               ) -> tuple[torch.Tensor, torch.Tensor]:
        """As Schedule's."""
        if self.prediction_type == "epsilon":
            return eps, torch.ones_like(a)
        target = a[:, None, None, None] * eps - s[:, None, None, None] * x
        return target, a**2                              # SNR / (SNR + 1) = a^2


def _coefficients(log_sigma):
    return torch.sigmoid(-2 * log_sigma).sqrt().float(), torch.sigmoid(2 * log_sigma).sqrt().float()
