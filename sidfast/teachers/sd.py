"""Stable Diffusion 1.x and 2.x."""

import torch

from sidfast.method.conditions import Conditions, dtype_of


def predict(network, x: torch.Tensor, t: torch.Tensor, cond: Conditions) -> torch.Tensor:
    """The UNet's output o [N, C, H, W] for x [N, C, H, W], timesteps t [N] and the text, in the text's type."""
    return network(x.to(dtype_of(cond)), t, **cond, return_dict=False)[0]
