"""GroupNorm of channels-last tensors with what stands around it: a shift and a concatenation before, SiLU after.

The input u = x + v[n, c] is one tensor x [N, ..., C], or two that count as concatenated along C (a group may lie across
the seam); neither u nor the concatenation exists in memory. A group is S positions of C / G channels:

    xh = (u - mean) rstd        z = xh w + b        y = z, or silu(z) = z sigmoid(z)

mean and rstd come from the sums of channel_stats, chunk by chunk; v moves a chunk's mean and leaves its squares. With
centre = mean - v and scale = w rstd, each [N, C], the input is read as stored: z = (x - centre) scale + b. Backward
reads x and dy twice, first for sums over positions; with dz = dy silu'(z),

    du = rstd (w dz - E[w dz] - xh E[w dz xh])          E: the mean over a group
    dw = sum dz xh        db = sum dz        dv[n, c] = sum over positions of du
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from sidfast.kernels.backend import UNFUSED, require, tile_of, triton_runs_on, widen
from sidfast.kernels.channel_stats import CHUNK, add_channel_stats, sum_rows

# Positions and channels of a program that goes over elements, and channels of one that sums over a chunk.
_TILE = {"BS": 16, "BC": 64, "num_warps": 2}
_SUMS = {"BS": CHUNK, "BC": 32, "num_warps": 2}


def group_norm_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float = 1e-5,
                         silu: bool = False, shift: torch.Tensor | None = None, other: torch.Tensor | None = None
                         ) -> torch.Tensor:
    """x [N, ..., C1], other [N, ..., C2]; weight, bias [C1 + C2]; shift [N, C1 + C2]. Returns y [N, ..., C1 + C2]."""
    u = widen(x) if other is None else torch.cat((widen(x), widen(other)), -1)
    if shift is not None:
        u = u + widen(shift).reshape(len(u), *(1,) * (u.ndim - 2), -1)
    u = u.movedim(-1, 1)
    by_group = u.reshape(len(u), groups, -1)
    mean = by_group.mean(2, keepdim=True)
    variance = ((by_group - mean) ** 2).mean(2, keepdim=True)
    xh = ((by_group - mean) / (variance + eps).sqrt()).reshape(u.shape).movedim(1, -1)
    z = xh * widen(weight) + widen(bias)
    return (z * z.sigmoid() if silu else z).to(x.dtype)


@triton.jit
def _load_sums(p_1, p_2, i_n, start, row, chunks, o_c, m_c, C1, C2, TWO: tl.constexpr, BK: tl.constexpr):
    """[BK, BG]: one of the two rows of [N, chunks, 2, C1 + C2], for some chunks and the channels of a group."""
    o_k = start + tl.arange(0, BK)
    o = (i_n * chunks + o_k) * 2 + row
    m = (o_k < chunks)[:, None] & m_c[None, :]
    b = tl.load(p_1 + o[:, None] * C1 + o_c[None, :], mask=m & (o_c < C1)[None, :], other=0.0)
    if TWO:
        b += tl.load(p_2 + o[:, None] * C2 + (o_c - C1)[None, :], mask=m & (o_c >= C1)[None, :], other=0.0)
    return b


@triton.jit
def _group_norm_moments_kernel(p_stats1, p_stats2, p_shift, p_weight, p_channel, p_rstd, S, chunks, C1, C2, CG, eps,
                               SHIFT: tl.constexpr, TWO: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr,
                               BG: tl.constexpr):
    i_n, i_g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    C = C1 + C2
    o_c = i_g * CG + tl.arange(0, BG)
    m_c = tl.arange(0, BG) < CG
    b_shift = tl.zeros([BG], tl.float32)
    if SHIFT:
        b_shift = tl.load(p_shift + i_n * C + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_sum = tl.zeros([BG], tl.float32)
    for start in range(0, chunks, BK):
        b_sum += tl.sum(_load_sums(p_stats1, p_stats2, i_n, start, 0, chunks, o_c, m_c, C1, C2, TWO, BK), 0)
    b_mean = tl.sum(b_sum / S + b_shift, 0) / CG

    b_centred = tl.zeros([BG], tl.float32)               # sum over positions of u - mean
    b_square = tl.zeros([BG], tl.float32)
    for start in range(0, chunks, BK):
        b_s = _load_sums(p_stats1, p_stats2, i_n, start, 0, chunks, o_c, m_c, C1, C2, TWO, BK)
        b_q = _load_sums(p_stats1, p_stats2, i_n, start, 1, chunks, o_c, m_c, C1, C2, TWO, BK)
        o_k = start + tl.arange(0, BK)
        b_size = tl.maximum(tl.minimum(BS, S - o_k * BS), 0).to(tl.float32)[:, None]
        b_gap = tl.where((o_k < chunks)[:, None] & m_c[None, :],
                         b_s / tl.maximum(b_size, 1.0) + b_shift[None, :] - b_mean, 0.0)
        b_centred += tl.sum(b_size * b_gap, 0)
        b_square += tl.sum(b_q + b_size * b_gap * b_gap, 0)
    b_rstd = 1.0 / tl.sqrt(tl.sum(b_square, 0) / (S * CG) + eps)

    b_weight = tl.load(p_weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    p = p_channel + i_n * 3 * C + o_c
    tl.store(p, b_mean - b_shift, mask=m_c)
    tl.store(p + C, b_weight * b_rstd, mask=m_c)
    tl.store(p + 2 * C, b_centred, mask=m_c)
    tl.store(p_rstd + i_n * tl.num_programs(1) + i_g, b_rstd)


@triton.jit
def _load_channels(p_channel, p_bias, i_n, o_c, C1, C, seam):
    """centre, scale and bias."""
    m_c = o_c < C1
    p = p_channel + i_n * 3 * C + seam + o_c
    b_bias = tl.load(p_bias + seam + o_c, mask=m_c, other=0.0).to(tl.float32)
    return tl.load(p, mask=m_c, other=0.0), tl.load(p + C, mask=m_c, other=0.0), b_bias


@triton.jit
def _group_norm_apply_kernel(p_x, p_channel, p_bias, p_y, S, C1, C, seam, SILU: tl.constexpr, BS: tl.constexpr,
                             BC: tl.constexpr):
    i_c, i_k = tile_of(tl.program_id(0), C1, BC)
    i_n = tl.program_id(1).to(tl.int64)
    o_s = i_k * BS + tl.arange(0, BS)
    o_c = i_c * BC + tl.arange(0, BC)
    b_centre, b_scale, b_bias = _load_channels(p_channel, p_bias, i_n, o_c, C1, C, seam)
    m = (o_s < S)[:, None] & (o_c < C1)[None, :]
    b_x = tl.load(p_x + (i_n * S + o_s)[:, None] * C1 + o_c[None, :], mask=m, other=0.0).to(tl.float32)
    b_z = (b_x - b_centre[None, :]) * b_scale[None, :] + b_bias[None, :]
    if SILU:
        b_z = b_z * tl.sigmoid(b_z)
    tl.store(p_y + (i_n * S + o_s)[:, None] * C + seam + o_c[None, :], b_z.to(p_y.dtype.element_ty), mask=m)


@triton.jit
def _load_gradient(p_x, p_dy, b_centre, b_scale, b_bias, i_n, o_s, o_c, S, C1, C, seam, SILU: tl.constexpr):
    """x - centre, and dz (0 outside the tensor)."""
    m = (o_s < S)[:, None] & (o_c < C1)[None, :]
    b_x = tl.load(p_x + (i_n * S + o_s)[:, None] * C1 + o_c[None, :], mask=m, other=0.0).to(tl.float32)
    b_dz = tl.load(p_dy + (i_n * S + o_s)[:, None] * C + seam + o_c[None, :], mask=m, other=0.0).to(tl.float32)
    b_x -= b_centre[None, :]
    if SILU:
        b_z = b_x * b_scale[None, :] + b_bias[None, :]
        b_sigmoid = tl.sigmoid(b_z)
        b_dz = b_dz * b_sigmoid * (1.0 + b_z * (1.0 - b_sigmoid))
    return b_x, b_dz


@triton.jit
def _group_norm_backward_sums_kernel(p_x, p_dy, p_channel, p_bias, p_sums, S, C1, C, seam, SILU: tl.constexpr,
                                     BS: tl.constexpr, BC: tl.constexpr):
    i_c, i_k = tile_of(tl.program_id(0), C1, BC)
    i_n = tl.program_id(1).to(tl.int64)
    o_s = i_k * BS + tl.arange(0, BS)
    o_c = i_c * BC + tl.arange(0, BC)
    b_centre, b_scale, b_bias = _load_channels(p_channel, p_bias, i_n, o_c, C1, C, seam)
    b_x, b_dz = _load_gradient(p_x, p_dy, b_centre, b_scale, b_bias, i_n, o_s, o_c, S, C1, C, seam, SILU)
    p = p_sums + ((i_n * tl.cdiv(S, BS) + i_k) * 2) * C1 + o_c
    tl.store(p, tl.sum(b_dz, 0), mask=o_c < C1)
    tl.store(p + C1, tl.sum(b_dz * b_x, 0), mask=o_c < C1)


@triton.jit
def _group_norm_backward_means_kernel(p_sums1, p_sums2, p_channel, p_rstd, p_weight, p_slope, p_affine, p_dshift, S,
                                      chunks, C1, C2, CG, AFFINE: tl.constexpr, SHIFT: tl.constexpr, TWO: tl.constexpr,
                                      BK: tl.constexpr, BG: tl.constexpr):
    """slope and level of du = scale dz + slope (x - centre) + level; per sample dw, db, dv."""
    i_n, i_g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    C = C1 + C2
    o_c = i_g * CG + tl.arange(0, BG)
    m_c = tl.arange(0, BG) < CG
    b_dz = tl.zeros([BG], tl.float32)
    b_dzx = tl.zeros([BG], tl.float32)
    for start in range(0, chunks, BK):
        b_dz += tl.sum(_load_sums(p_sums1, p_sums2, i_n, start, 0, chunks, o_c, m_c, C1, C2, TWO, BK), 0)
        b_dzx += tl.sum(_load_sums(p_sums1, p_sums2, i_n, start, 1, chunks, o_c, m_c, C1, C2, TWO, BK), 0)
    b_rstd = tl.load(p_rstd + i_n * tl.num_programs(1) + i_g)
    b_weight = tl.load(p_weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_level = -b_rstd * tl.sum(b_weight * b_dz, 0) / (S * CG)
    b_slope = -b_rstd * b_rstd * b_rstd * tl.sum(b_weight * b_dzx, 0) / (S * CG)
    o = i_n * C + o_c
    b_zero = tl.zeros([BG], tl.float32)
    tl.store(p_slope + i_n * C + o, b_zero + b_slope, mask=m_c)
    tl.store(p_slope + i_n * C + o + C, b_zero + b_level, mask=m_c)
    if AFFINE:
        tl.store(p_affine + i_n * C + o, b_rstd * b_dzx, mask=m_c)
        tl.store(p_affine + i_n * C + o + C, b_dz, mask=m_c)
    if SHIFT:
        b_centred = tl.load(p_channel + i_n * 3 * C + 2 * C + o_c, mask=m_c, other=0.0)
        b_dshift = b_weight * b_rstd * b_dz + b_slope * b_centred + S * b_level
        tl.store(p_dshift + o, b_dshift.to(p_dshift.dtype.element_ty), mask=m_c)


@triton.jit
def _group_norm_backward_kernel(p_x, p_dy, p_channel, p_bias, p_slope, p_residual, p_dx, S, C1, C, seam,
                                SILU: tl.constexpr, ADD: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr):
    # Last program first: what the pass for the sums touched last is still in the L2 cache.
    i_c, i_k = tile_of(tl.num_programs(0) - 1 - tl.program_id(0), C1, BC)
    i_n = (tl.num_programs(1) - 1 - tl.program_id(1)).to(tl.int64)
    o_s = i_k * BS + tl.arange(0, BS)
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < C1
    m = (o_s < S)[:, None] & m_c[None, :]
    b_centre, b_scale, b_bias = _load_channels(p_channel, p_bias, i_n, o_c, C1, C, seam)
    b_x, b_dz = _load_gradient(p_x, p_dy, b_centre, b_scale, b_bias, i_n, o_s, o_c, S, C1, C, seam, SILU)
    b_slope = tl.load(p_slope + i_n * 2 * C + seam + o_c, mask=m_c, other=0.0)
    b_level = tl.load(p_slope + i_n * 2 * C + C + seam + o_c, mask=m_c, other=0.0)
    b_dx = b_scale[None, :] * b_dz + b_slope[None, :] * b_x + b_level[None, :]
    o = (i_n * S + o_s)[:, None] * C1 + o_c[None, :]
    if ADD:
        b_dx += tl.load(p_residual + o, mask=m, other=0.0).to(tl.float32)
    tl.store(p_dx + o, b_dx.to(p_dx.dtype.element_ty), mask=m)


def _sizes(xs, groups):
    """N, S, the channels of each input, and the blocks of the kernels that merge chunks."""
    N, S, channels = xs[0].shape[0], math.prod(xs[0].shape[1:-1]), [x.shape[-1] for x in xs]
    if sum(channels) % groups:
        raise ValueError(f"group_norm: {sum(channels)} channels do not divide into {groups} groups")
    CG, chunks = sum(channels) // groups, triton.cdiv(S, CHUNK)
    BG = triton.next_power_of_2(CG)
    BK = max(1, min(triton.next_power_of_2(chunks), 2048 // BG))
    merge = {"S": S, "chunks": chunks, "C1": channels[0], "C2": sum(channels[1:]), "CG": CG, "TWO": len(xs) == 2,
             "BK": BK, "BG": BG, "num_warps": 4 if BG <= 2048 else 8, **UNFUSED}
    return N, S, channels, merge


def _each(xs, N, S, tile):
    """For each input: itself, and grid and options of a kernel that goes over it in tiles of positions and channels."""
    seam = 0
    for x in xs:
        C1 = x.shape[-1]
        yield x, (triton.cdiv(C1, tile["BC"]) * triton.cdiv(S, tile["BS"]), N), {"C1": C1, "seam": seam, **tile}
        seam += C1


def group_norm_forward(xs: Sequence[torch.Tensor], stats: Sequence[torch.Tensor], weight: torch.Tensor,
                       bias: torch.Tensor, groups: int, eps: float, shift: torch.Tensor | None = None,
                       silu: bool = False) -> tuple[torch.Tensor, Any]:
    """y [N, ..., C] and what backward needs, from one or two inputs and their statistics.

    xs: [N, ..., C1] and perhaps [N, ..., C2], contiguous; stats: add_channel_stats' for each; weight, bias [C1 + C2];
    shift [N, C1 + C2]. y has xs[0]'s type. saved: `channel`, fp32 [N, 3, C] (centre, scale, sum over positions of
    u - mean), and rstd, fp32 [N, groups]. ValueError for shapes or strides that do not fit, or if groups do not divide
    C.
    """
    N, S, channels, merge = _sizes(xs, groups)
    C = sum(channels)
    for x, sums in zip(xs, stats, strict=True):
        require("group_norm_forward", (x, (*xs[0].shape[:-1], x.shape[-1])),
                (sums, (N, merge["chunks"], 2, x.shape[-1])))
    require("group_norm_forward", (weight, (C,)), (bias, (C,)), (shift, (N, C)))
    channel = weight.new_empty(N, 3, C, dtype=torch.float32)
    rstd = weight.new_empty(N, groups, dtype=torch.float32)
    _group_norm_moments_kernel[(N, groups)](
        p_stats1=stats[0], p_stats2=stats[-1], p_shift=shift, p_weight=weight, p_channel=channel, p_rstd=rstd, eps=eps,
        SHIFT=shift is not None, BS=CHUNK, **merge)
    y = xs[0].new_empty(*xs[0].shape[:-1], C)
    for x, grid, options in _each(xs, N, S, _TILE):
        _group_norm_apply_kernel[grid](p_x=x, p_channel=channel, p_bias=bias, p_y=y, S=S, C=C, SILU=silu, **options)
    return y, (channel, rstd)


def group_norm_backward(dy: torch.Tensor, xs: Sequence[torch.Tensor], saved: Any, weight: torch.Tensor,
                        bias: torch.Tensor, groups: int, silu: bool = False,
                        residuals: Sequence[torch.Tensor | None] | None = None, affine: bool = True, shift: bool = False
        ) -> tuple[Sequence[torch.Tensor], torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(dxs, dweight [C], dbias [C], dshift [N, C]) of group_norm_forward; all but dxs in weight's type.

    residuals: for each input None or a gradient of its shape, added into its dx. Without `affine` dweight and dbias,
    and without `shift` dshift, are None. ValueError for shapes that do not fit, or strides.
    """
    residuals = residuals or [None] * len(xs)
    N, S, channels, merge = _sizes(xs, groups)
    C, (channel, rstd) = sum(channels), saved
    require("group_norm_backward", (dy, (*xs[0].shape[:-1], C)), *((x, x.shape) for x in xs), (weight, (C,)),
            *((v, x.shape) for v, x in zip(residuals, xs, strict=True)), (bias, (C,)), (channel, (N, 3, C)),
            (rstd, (N, groups)))
    fixed = {"p_dy": dy, "p_channel": channel, "p_bias": bias, "S": S, "C": C, "SILU": silu}
    sums = [x.new_empty(N, merge["chunks"], 2, x.shape[-1], dtype=torch.float32) for x in xs]
    for (x, grid, options), p_sums in zip(_each(xs, N, S, _SUMS), sums, strict=True):
        _group_norm_backward_sums_kernel[grid](p_x=x, p_sums=p_sums, **options, **fixed)

    slope = rstd.new_empty(N, 2, C)
    by_sample = rstd.new_empty(N, 2 * C) if affine else None
    dshift = weight.new_empty(N, C) if shift else None
    _group_norm_backward_means_kernel[(N, groups)](
        p_sums1=sums[0], p_sums2=sums[-1], p_channel=channel, p_rstd=rstd, p_weight=weight, p_slope=slope,
        p_affine=by_sample, p_dshift=dshift, AFFINE=affine, SHIFT=shift, **merge)

    dxs = [torch.empty_like(x) for x in xs]
    for (x, grid, options), residual, dx in reversed(list(zip(_each(xs, N, S, _TILE), residuals, dxs, strict=True))):
        _group_norm_backward_kernel[grid](p_x=x, p_slope=slope, p_residual=residual, p_dx=dx, ADD=residual is not None,
                                          **options, **fixed)
    dweight, dbias = sum_rows(by_sample, weight.dtype).view(2, C) if affine else (None, None)
    return dxs, dweight, dbias, dshift


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, stats, other, other_stats, shift, weight, bias, groups, eps, silu):
        xs, all_stats = ([x], [stats]) if other is None else ([x, other], [stats, other_stats])
        all_stats = [add_channel_stats(v)[1] if sums is None else sums for v, sums in zip(xs, all_stats, strict=True)]
        y, saved = group_norm_forward(xs, all_stats, weight, bias, groups, eps, shift, silu)
        ctx.save_for_backward(weight, bias, *saved, *xs)
        ctx.groups, ctx.silu = groups, silu
        ctx.set_materialize_grads(False)
        return y, x, other

    @staticmethod
    def backward(ctx, dy, *residuals):
        weight, bias, channel, rstd, *xs = ctx.saved_tensors
        _, _, _, _, shift, need_weight, need_bias, *_ = ctx.needs_input_grad
        residuals = [None if d is None else d.contiguous() for d in residuals[:len(xs)]]
        if dy is None:
            return residuals[0], None, residuals[1] if len(xs) == 2 else None, *[None] * 7
        dxs, dweight, dbias, dshift = group_norm_backward(
            dy.contiguous(), xs, (channel, rstd), weight, bias, ctx.groups, ctx.silu, residuals,
            need_weight or need_bias, shift)
        dother = dxs[1] if len(dxs) == 2 else None
        return dxs[0], None, dother, None, dshift, dweight, dbias, None, None, None


def group_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float = 1e-5,
               silu: bool = False, shift: torch.Tensor | None = None, other: torch.Tensor | None = None,
               stats: torch.Tensor | None = None, other_stats: torch.Tensor | None = None
               ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(y, x, other): GroupNorm of x [N, ..., C1], or of x and `other` [N, ..., C2] concatenated, plus shift [N, C];
    then SiLU or not. Whatever else reads x and other should read those returned: their gradients are then added inside
    the backward kernel.

    weight, bias [C], C = C1 + C2; stats, other_stats: add_channel_stats' of x and other, computed where None; any of
    fp32, bf16, fp16 (y has x's type). Differentiable in all other tensors. ValueError if groups do not divide C, and
    of the kernels for shapes that do not fit.
    """
    C = x.shape[-1] + (0 if other is None else other.shape[-1])
    if C % groups:
        raise ValueError(f"group_norm: {C} channels do not divide into {groups} groups")
    if not triton_runs_on(x):
        return group_norm_reference(x, weight, bias, groups, eps, silu, shift, other), x, other
    tensors = [None if v is None else v.contiguous() for v in (x, other, shift, weight, bias)]
    return _GroupNorm.apply(tensors[0], stats, tensors[1], other_stats, *tensors[2:], groups, eps, silu)
