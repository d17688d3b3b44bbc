"""Noise schedules: the path from image to noise, and what a network on it predicts (method.md, sections 1, 2 and 5).

The equations see a teacher through a Schedule alone: (a, s) at each time, the times of noise levels, (A, B) of eq. 2,
and target and weight of eq. 5. The schedules that teachers have are in sidfast/teachers/paths.py.
"""

from typing import Protocol

import torch


class Schedule(Protocol):
    """A path x_t = a x + s eps, and the kind of a network's output on it. Its length is T, the number of timesteps."""

    def __len__(self) -> int: ...

    def to(self, device: torch.device | str) -> "Schedule":
        """The same schedule with its tables on another device."""

    def coefficients(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(a, s) of timesteps t, whole or fractional, fp32, each of t's shape (eq. 1)."""

    def log_sigma(self, t: torch.Tensor | float) -> torch.Tensor:
        """ln sigma, sigma = s / a, of timesteps t (a tensor or a number), float64."""

    def timestep(self, log_sigma: torch.Tensor) -> torch.Tensor:
        """The inverse of `log_sigma`: fractional timesteps, float64."""

    def to_x0(self, a: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(A, B) with x_hat = A x_t + B o (eq. 2), each of the shape of a and s."""

    def target(self, x: torch.Tensor, eps: torch.Tensor, a: torch.Tensor, s: torch.Tensor
               ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a network should output at a x + s eps, [N, C, H, W], and its weight w [N] (eq. 5), for x and eps
        [N, C, H, W], a and s [N]."""
