"""Guidance and the two losses (method.md, eqs. 2, 3 and 5 to 8), on outputs of networks."""

from collections.abc import Callable, Sequence

import torch

from sidfast.kernels.fake_score_loss import fake_score_loss as fake_score_loss_kernel
from sidfast.kernels.sid_loss import sid_loss
from sidfast.method.conditions import Conditions, cat, expand, where
from sidfast.method.schedule import Schedule

Predict = Callable[..., torch.Tensor]
"""predict(network, x [N, C, H, W], t [N], Conditions) -> the output o [N, C, H, W] of one pass."""


def passes(kappas: Sequence[float]) -> int:
    """1 or 2: the passes that eq. 3 needs at the given scales. The conditional alone if all are 1, the unconditional
    alone if all are 0; otherwise both, as one over a doubled batch."""
    return 1 if all(k == 1 for k in kappas) or all(k == 0 for k in kappas) else 2


def copies(network: Callable, kappas: Sequence[float]) -> int:
    """How often `predict_guided` wants x_t: once for each pass, unless the network itself repeats it (FusedUNet)."""
    return 1 if getattr(network, "repeats_images", False) else passes(kappas)


def predict_guided(predict: Predict, network: Callable, x: torch.Tensor, t: torch.Tensor, cond: Conditions,
                   uncond: Conditions, kappas: Sequence[float]) -> torch.Tensor:
    """o_null and o_cond of eq. 3, which `sidfast.kernels` combine at the given scales; or the one that these need.

    x [copies * N, C, H, W], x_t as often as `copies` says; timesteps t [N]; `cond` of N samples, `uncond` of one.
    Returns [passes * N, C, H, W], the unconditional half first.
    """
    if all(k == 1 for k in kappas):
        return predict(network, x, t, cond)
    uncond = expand(uncond, len(t))
    if all(k == 0 for k in kappas):
        return predict(network, x, t, uncond)
    return predict(network, x, t.repeat(len(x) // len(t)), cat([uncond, cond]))


def drops_prompts(kappa1: float, kappa2: float, kappa3: float) -> bool:
    """Whether the fake score's unconditional branch is used, and so has to be trained."""
    return any(k != 1 for k in (kappa1, kappa2, kappa3))


def drop_prompts(cond: Conditions, uncond: Conditions, dropped: torch.Tensor) -> Conditions:
    """`cond` of N samples, with `uncond` in the rows where `dropped` [N] is true."""
    return where(dropped, uncond, cond)


def fake_score_loss(output: torch.Tensor, x_g: torch.Tensor, eps: torch.Tensor, a: torch.Tensor, s: torch.Tensor,
                    schedule: Schedule, kappa1: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 5. output [N or 2N, C, H, W] at x_t = a x_g + s eps; x_g, eps [N, C, H, W]; a, s [N].

    Returns loss [N] and finite [N] (bool). A gradient flows to the output alone. Raises ValueError for an output with
    neither N nor 2N rows.
    """
    target, w = schedule.target(x_g, eps, a, s)
    return fake_score_loss_kernel(output, target, w, kappa1)


def generator_loss(x_g: torch.Tensor, x_t: torch.Tensor, o_real: torch.Tensor, o_fake: torch.Tensor, a: torch.Tensor,
                   s: torch.Tensor, schedule: Schedule, kappas: Sequence[float], alpha: float
                   ) -> tuple[torch.Tensor, torch.Tensor]:
    """Eqs. 6 to 8. x_g, x_t [N, C, H, W]; o_real, o_fake [N or 2N, C, H, W]; a, s [N]; kappas: (kappa2, kappa3,
    kappa4).

    Returns loss [N] and finite [N] (bool). Gradients flow to x_g, x_t and both outputs. Raises ValueError for an
    output with neither N nor 2N rows.
    """
    A, B = schedule.to_x0(a, s)
    return sid_loss(x_g, x_t, o_real, o_fake, A, B, *kappas, alpha)
