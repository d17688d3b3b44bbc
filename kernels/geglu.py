"""GEGLU, the gated activation of a transformer's feed-forward layer, with the exact GELU. x = [a | g], each [T, F]:

    y = a g Phi(g)        Phi(g) = (1 + erf(g / sqrt 2)) / 2
    da = dy g Phi(g)        dg = dy a (Phi(g) + g phi(g))        phi(g) = exp(-g^2 / 2) / sqrt(2 pi)

The sums of dx over rows are the gradient of the bias in the product that made x.
"""

import torch
import triton
import triton.language as tl
from sidfast.kernels.backend import require, share, tile_of, triton_runs_on, widen
from sidfast.kernels.channel_stats import sum_rows


def geglu_reference(x: torch.Tensor) -> torch.Tensor:
    """x [..., 2F]. Returns y [..., F] in x's type."""
    a, g = widen(x).chunk(2, -1)
    return (a * (g * (0.5 + 0.5 * torch.erf(g * 0.5**0.5)))).to(x.dtype)         # (a g alone might overflow)


@triton.jit
def _geglu_kernel(p_x, p_y, T, F, BT: tl.constexpr, BF: tl.constexpr):
    i_f, i_t = tile_of(tl.program_id(0), F, BF)
    i_t = i_t.to(tl.int64)
    o_t = i_t * BT + tl.arange(0, BT)
    o_f = i_f * BF + tl.arange(0, BF)
    m = (o_t < T)[:, None] & (o_f < F)[None, :]
    o = o_t[:, None] * (2 * F) + o_f[None, :]
    b_a = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
    b_g = tl.load(p_x + o + F, mask=m, other=0.0).to(tl.float32)
    b_y = b_a * (b_g * (0.5 + 0.5 * tl.erf(b_g * 0.7071067811865476)))
    tl.store(p_y + o_t[:, None] * F + o_f[None, :], b_y.to(p_y.dtype.element_ty), mask=m)


@triton.jit
def _geglu_backward_kernel(p_dy, p_x, p_dx, p_sums, T, F, blocks, SUMS: tl.constexpr, BT: tl.constexpr,
                           BF: tl.constexpr):
    i_f, i_t = tile_of(tl.program_id(0), F, BF)
    i_t = i_t.to(tl.int64)
    o_f = i_f * BF + tl.arange(0, BF)
    b_sum_a = tl.zeros([BT, BF], tl.float32)
    b_sum_g = tl.zeros([BT, BF], tl.float32)
    for i in tl.range(blocks, num_stages=3):
        o_t = (i_t * blocks + i) * BT + tl.arange(0, BT)
        m = (o_t < T)[:, None] & (o_f < F)[None, :]
        o = o_t[:, None] * (2 * F) + o_f[None, :]
        b_a = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
        b_g = tl.load(p_x + o + F, mask=m, other=0.0).to(tl.float32)
        b_dy = tl.load(p_dy + o_t[:, None] * F + o_f[None, :], mask=m, other=0.0).to(tl.float32)
        b_cdf = 0.5 + 0.5 * tl.erf(b_g * 0.7071067811865476)
        b_da = b_dy * (b_g * b_cdf)
        b_dg = b_dy * (b_a * (b_cdf + b_g * 0.3989422804014327 * tl.exp(-0.5 * b_g * b_g)))
        tl.store(p_dx + o, b_da.to(p_dx.dtype.element_ty), mask=m)
        tl.store(p_dx + o + F, b_dg.to(p_dx.dtype.element_ty), mask=m)
        if SUMS:
            b_sum_a += b_da
            b_sum_g += b_dg
    if SUMS:
        p = p_sums + i_t * 2 * F + o_f
        tl.store(p, tl.sum(b_sum_a, 0), mask=o_f < F)
        tl.store(p + F, tl.sum(b_sum_g, 0), mask=o_f < F)


def geglu_forward(x: torch.Tensor) -> torch.Tensor:
    """y [..., F] in x's type for x [..., 2F], contiguous (ValueError if not)."""
    require("geglu_forward", (x, x.shape))
    T, F = x.shape[:-1].numel(), x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], F)
    _geglu_kernel[(triton.cdiv(F, 256) * triton.cdiv(T, 8),)](p_x=x, p_y=y, T=T, F=F, BT=8, BF=256, num_warps=4)
    return y


def geglu_backward(dy: torch.Tensor, x: torch.Tensor, sums_type: torch.dtype | None = None
                   ) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(dx, sums) of geglu_forward: dx has x's shape and type, sums [2F] are its sums over rows, in
    `sums_type`, or None without.

    ValueError if dy does not fit x, or one is not contiguous.
    """
    T, F = x.shape[:-1].numel(), x.shape[-1] // 2
    require("geglu_backward", (dy, (*x.shape[:-1], F)), (x, x.shape))
    dx, columns = torch.empty_like(x), triton.cdiv(F, 128)
    programs, blocks = share(triton.cdiv(T, 16), x.device, columns)
    sums = x.new_empty(programs, 2 * F, dtype=torch.float32) if sums_type else None
    _geglu_backward_kernel[(columns * programs,)](p_dy=dy, p_x=x, p_dx=dx, p_sums=sums, T=T, F=F, blocks=blocks,
                                                  SUMS=sums is not None, BT=16, BF=128, num_warps=4)
    return dx, sum_rows(sums, sums_type) if sums_type else None


class _Geglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias_in_x):
        ctx.save_for_backward(x)
        return geglu_forward(x)

    @staticmethod
    def backward(ctx, dy):
        [x] = ctx.saved_tensors
        return geglu_backward(dy.contiguous(), x, x.dtype if ctx.needs_input_grad[1] else None)


def geglu(x: torch.Tensor, bias_in_x: torch.Tensor | None = None) -> torch.Tensor:
    """The first half of x times the exact GELU of the second: [..., 2F] -> [..., F], in any of fp32, bf16, fp16.

    bias_in_x [2F]: what x contains already, and what gets its gradient here (in x's type). Differentiable. ValueError
    if the last dimension is odd.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"geglu: {x.shape[-1]} channels have no two halves")
    return _Geglu.apply(x.contiguous(), bias_in_x) if triton_runs_on(x) else geglu_reference(x)
