"""Layers as PyTorch users write them: what the kernels are measured against, in time (here) and in rounding (tests)."""

import torch
from torch.nn import functional as F


def group_norm(groups, silu):
    """compute(x, weight, bias, shift, other): GroupNorm of x [N, ..., C1] with `other` as further channels and
    shift [N, C] added, then SiLU or not."""

    def compute(x, weight, bias, shift=None, other=None):
        u = x if other is None else torch.cat((x, other), -1)
        if shift is not None:
            u = u + shift.view(len(u), *(1,) * (u.ndim - 2), -1)
        z = F.group_norm(u.movedim(-1, 1), groups, weight, bias).movedim(1, -1)
        return F.silu(z) if silu else z

    return compute


def layer_norm(x, weight, bias, residual=None, bias_of_x=None):
    """(h, LayerNorm of h) for h = x + bias_of_x + residual [..., C]."""
    h = sum((v for v in (bias_of_x, residual) if v is not None), x)
    return h, F.layer_norm(h, h.shape[-1:], weight, bias)


def geglu(x):
    """[..., 2F] -> [..., F]."""
    a, g = x.chunk(2, -1)
    return a * F.gelu(g)
