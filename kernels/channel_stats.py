"""Sums over positions, channel by channel, of channels-last tensors: what a GroupNorm needs to know of its input.

A chunk is n = CHUNK positions of one sample (the last may be shorter). For each channel of y = x + residual + bias

    sum = sum_i y_i        square = sum_i (y_i - sum / n)^2

Centred about the chunk's own mean, because E[y^2] - E[y]^2 cancels where the mean is large. Chunks, and channels, merge
by Chan's formula: about any mean, n values have the squares  square + n (sum / n - mean)^2.

Also the sum of each column of a matrix, which is the gradient of a bias, and the last step of all sums over rows.
"""

import math

import torch
import triton
import triton.language as tl
from sidfast.kernels.backend import require, share, tile_of, widen

CHUNK = 64
COLUMNS = 64                                             # channels of a program


def add_channel_stats_reference(x: torch.Tensor, residual: torch.Tensor | None = None, bias: torch.Tensor | None = None
                                ) -> tuple[torch.Tensor, torch.Tensor]:
    """y [N, ..., C] in x's type; stats [N, chunks, 2, C] of y as rounded."""
    y = widen(x)
    if residual is not None:
        y = y + widen(residual)
    if bias is not None:
        y = y + widen(bias)
    y = y.to(x.dtype)
    stats = []
    for chunk in widen(y).flatten(1, -2).split(CHUNK, 1):
        centred = chunk - chunk.mean(1, keepdim=True)
        stats.append(torch.stack((chunk.sum(1), (centred**2).sum(1)), 1))
    return y, torch.stack(stats, 1)


def column_sums_reference(x: torch.Tensor) -> torch.Tensor:
    """x [T, C]. Returns the sums [C]."""
    return widen(x).sum(0)


@triton.jit
def _channel_stats_kernel(p_x, p_residual, p_bias, p_y, p_stats, S, C, W, ADD: tl.constexpr, BIAS: tl.constexpr,
                          INTERLEAVED: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr):
    i_c, i_k = tile_of(tl.program_id(0), C, BC)
    i_n = tl.program_id(1).to(tl.int64)
    o_s = i_k * BS + tl.arange(0, BS)
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < C
    m = (o_s < S)[:, None] & m_c[None, :]
    o = (i_n * S + o_s)[:, None] * C + o_c[None, :]
    o_x = o
    if INTERLEAVED:                                      # x is z of upsample.py
        o_u, o_v = o_s // W, o_s % W
        o_place = (i_n * (S // W // 2 + 1) + (o_u + 1) // 2) * (W // 2 + 1) + (o_v + 1) // 2
        o_x = (o_place * 4 + o_u % 2 * 2 + o_v % 2)[:, None] * C + o_c[None, :]
    b_y = tl.load(p_x + o_x, mask=m, other=0.0).to(tl.float32)
    if ADD:
        b_y += tl.load(p_residual + o, mask=m, other=0.0).to(tl.float32)
    if BIAS:
        b_y += tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    if ADD or BIAS or INTERLEAVED:
        b_stored = b_y.to(p_y.dtype.element_ty)
        tl.store(p_y + o, b_stored, mask=m)
        b_y = tl.where(m, b_stored.to(tl.float32), 0.0)
    b_sum = tl.sum(b_y, 0)
    b_centred = tl.where(m, b_y - (b_sum / tl.minimum(BS, S - i_k * BS))[None, :], 0.0)
    p = p_stats + ((i_n * tl.cdiv(S, BS) + i_k) * 2) * C + o_c
    tl.store(p, b_sum, mask=m_c)
    tl.store(p + C, tl.sum(b_centred * b_centred, 0), mask=m_c)


@triton.jit
def _column_sums_kernel(p_x, p_sums, T, C, blocks, BT: tl.constexpr, BC: tl.constexpr):
    i_c, i_t = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < C
    b_sum = tl.zeros([BT, BC], tl.float32)
    for i in range(blocks):
        o_t = (i_t * blocks + i) * BT + tl.arange(0, BT)
        m = (o_t < T)[:, None] & m_c[None, :]
        b_sum += tl.load(p_x + o_t[:, None] * C + o_c[None, :], mask=m, other=0.0).to(tl.float32)
    tl.store(p_sums + i_t * C + o_c, tl.sum(b_sum, 0), mask=m_c)


@triton.jit
def _sum_rows_kernel(p_parts, p_sums, P, K, BP: tl.constexpr, BK: tl.constexpr):
    o_k = tl.program_id(0) * BK + tl.arange(0, BK)
    b_sum = tl.zeros([BP, BK], tl.float32)
    for start in range(0, P, BP):
        o_p = start + tl.arange(0, BP)
        m = (o_p < P)[:, None] & (o_k < K)[None, :]
        b_sum += tl.load(p_parts + o_p[:, None] * K + o_k[None, :], mask=m, other=0.0)
    tl.store(p_sums + o_k, tl.sum(b_sum, 0).to(p_sums.dtype.element_ty), mask=o_k < K)


def add_channel_stats(x: torch.Tensor, residual: torch.Tensor | None = None, bias: torch.Tensor | None = None,
                      out: torch.Tensor | None = None, interleaved: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """y = x + residual + bias, and the statistics from which any GroupNorm of y starts.

    x, residual [N, ..., C], bias [C], in any of fp32, bf16, fp16. Returns y in x's type and stats, fp32
    [N, chunks, 2, C]: sum and centred squares of y as stored. `out` (like x; x itself is allowed) receives y. With
    neither residual nor bias, y is x and nothing is written. `interleaved`: x stands for what `upsample.interleave`
    makes of it, and y is a tensor of that shape. ValueError for shapes that do not fit, or strides.
    """
    shape = (x.shape[0], *(2 * (s - 1) for s in x.shape[1:-1]), x.shape[-1] // 4) if interleaved else x.shape
    N, S, C = shape[0], math.prod(shape[1:-1]), shape[-1]
    require("add_channel_stats", (x, x.shape), (residual, shape), (out, shape), (bias, (C,)))
    chunks = triton.cdiv(S, CHUNK)
    y = x
    if residual is not None or bias is not None or interleaved:
        y = x.new_empty(shape) if out is None else out
    stats = x.new_empty(N, chunks, 2, C, dtype=torch.float32)
    _channel_stats_kernel[(triton.cdiv(C, COLUMNS) * chunks, N)](
        p_x=x, p_residual=residual, p_bias=bias, p_y=y, p_stats=stats, S=S, C=C, W=shape[-2],
        ADD=residual is not None, BIAS=bias is not None, INTERLEAVED=interleaved, BS=CHUNK, BC=COLUMNS, num_warps=2)
    return y, stats


def sum_rows(parts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The sum over rows of what programs left, fp32 [programs, K], in one launch and in `dtype`: [K]."""
    P, K = parts.shape
    sums = parts.new_empty(K, dtype=dtype)
    BP = min(256, triton.next_power_of_2(P))
    _sum_rows_kernel[(triton.cdiv(K, 16),)](p_parts=parts, p_sums=sums, P=P, K=K, BP=BP, BK=16,
                                            num_warps=8 if BP > 64 else 1)
    return sums


def column_sums(x: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The sum of each column of x [T, C] in any of fp32, bf16, fp16: [C]. ValueError if x is not contiguous."""
    T, C = x.shape
    require("column_sums", (x, (T, C)))
    columns = triton.cdiv(C, COLUMNS)
    programs, blocks = share(triton.cdiv(T, 64), x.device, columns, density=8)
    sums = x.new_empty(programs, C, dtype=torch.float32)
    _column_sums_kernel[(columns, programs)](p_x=x, p_sums=sums, T=T, C=C, blocks=blocks, BT=64, BC=COLUMNS,
                                             num_warps=4)
    return sum_rows(sums, dtype)
