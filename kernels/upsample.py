"""Nearest-neighbour doubling of channels-last images, written once and read once: every pixel becomes four.

Backward adds the four gradients.
"""

import torch
import triton
import triton.language as tl
from sidfast.kernels.backend import require, triton_runs_on

_PIXELS, _CHANNELS = 16, 128                             # of a program


def double_reference(x):
    """x [N, H, W, C]. Returns [N, 2H, 2W, C]."""
    return x.repeat_interleave(2, 1).repeat_interleave(2, 2)


@triton.jit
def _tile(P, W, C, BP: tl.constexpr, BC: tl.constexpr):
    """Offsets of some pixels of the small image and of the first of their four in the large one, and the mask."""
    o_p = tl.program_id(1).to(tl.int64) * BP + tl.arange(0, BP)
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    o_first = (o_p // W) * 4 * W + (o_p % W) * 2         # two rows of 2 W pixels for each row of W
    m = (o_p < P)[:, None] & (o_c < C)[None, :]
    return o_p[:, None] * C + o_c[None, :], o_first[:, None] * C + o_c[None, :], m


@triton.jit
def _double_kernel(p_x, p_y, P, W, C, BP: tl.constexpr, BC: tl.constexpr):
    o, o_first, m = _tile(P, W, C, BP, BC)
    b_x = tl.load(p_x + o, mask=m)
    for row in tl.static_range(2):
        for column in tl.static_range(2):
            tl.store(p_y + o_first + (row * 2 * W + column) * C, b_x, mask=m)


@triton.jit
def _double_backward_kernel(p_dy, p_dx, P, W, C, BP: tl.constexpr, BC: tl.constexpr):
    o, o_first, m = _tile(P, W, C, BP, BC)
    b_dx = tl.zeros([BP, BC], tl.float32)
    for row in tl.static_range(2):
        for column in tl.static_range(2):
            b_dx += tl.load(p_dy + o_first + (row * 2 * W + column) * C, mask=m, other=0.0).to(tl.float32)
    tl.store(p_dx + o, b_dx.to(p_dx.dtype.element_ty), mask=m)


def _launch(kernel, source, target, small):
    N, H, W, C = small.shape
    grid = triton.cdiv(C, _CHANNELS), triton.cdiv(N * H * W, _PIXELS)
    kernel[grid](source, target, P=N * H * W, W=W, C=C, BP=_PIXELS, BC=_CHANNELS, num_warps=4)


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        N, H, W, C = x.shape
        y = x.new_empty(N, 2 * H, 2 * W, C)
        _launch(_double_kernel, x, y, small=x)
        return y

    @staticmethod
    def backward(ctx, dy):
        dy = dy.contiguous()
        N, H, W, C = dy.shape
        dx = dy.new_empty(N, H // 2, W // 2, C)
        _launch(_double_backward_kernel, dy, dx, small=dx)
        return dx


def double(x):
    """x [N, H, W, C] in any of fp32, bf16, fp16 -> [N, 2H, 2W, C]. Differentiable. ValueError if not contiguous."""
    if not triton_runs_on(x):
        return double_reference(x)
    require("double", (x, x.shape))
    return _Double.apply(x)
