"""The one-step generator (method.md, section 3)."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from sidfast.kernels.guidance import denoise
from sidfast.method.conditions import Conditions

if TYPE_CHECKING:
    from sidfast.method.updates import Objective


def generate(generator: Callable, z: torch.Tensor, cond: Conditions, objective: "Objective") -> torch.Tensor:
    """One-step images x_g [N, C, H, W] from noise z [N, C, H, W] (eq. 4). `generator`: the network; `objective`: the
    run's Objective."""
    _, s = objective.schedule.coefficients(torch.full((z.shape[0],), objective.t_init, device=z.device))
    return denoise_at(generator, s[:, None, None, None] * z, objective.t_init, cond, objective)


def denoise_at(network: Callable, x_t: torch.Tensor, level: int, cond: Conditions, objective: "Objective"
               ) -> torch.Tensor:
    """x_hat [N, C, H, W] of x_t [N, C, H, W] at one timestep for all samples, `level`, in one conditional pass
    (eq. 2)."""
    t = torch.full((x_t.shape[0],), level, device=x_t.device)
    A, B = objective.schedule.to_x0(*objective.schedule.coefficients(t))
    return denoise(objective.predict(network, x_t, t, cond), x_t, A, B, 1)
