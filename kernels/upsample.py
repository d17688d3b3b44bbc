"""Nearest-neighbour doubling and the 3x3 convolution after it, as one 2x2 convolution of the small image.

Of the nine taps on a doubled image several fall on the same pixel of the small one. Along one axis, an even output row
2i sees the small rows (i - 1, i) with weights (w0, w1 + w2), an odd one 2i + 1 sees (i, i + 1) with (w0 + w1, w2). So a
2x2 convolution with padding 1 and four times the channels gives, at [i, j], all four outputs (p, q) that see the pixels
(i - 1, i) x (j - 1, j): z [N, H + 1, W + 1, (p, q, K)] has 4/9 of the multiplications, and

    y[2i + p, 2j + q] = z[i + p, j + q, (p, q)]

"""

import torch
import triton
import triton.language as tl
from sidfast.kernels.backend import require, require_shapes, widen
from sidfast.kernels.channel_stats import add_channel_stats

_ROWS, _CHANNELS, _TAPS = 16, 128, 256                   # of a program: rows, channels; channels of all its taps


def combine_taps_reference(weight: torch.Tensor) -> torch.Tensor:
    """`combine_taps` in plain PyTorch."""
    by_parity = _combine(_combine(widen(weight), 2), -1)                         # [q, b, p, a, K, C]
    combined = by_parity.permute(2, 0, 4, 5, 3, 1).flatten(0, 2)
    return combined.to(weight.dtype, memory_format=torch.channels_last)


def separate_taps_reference(gradient: torch.Tensor) -> torch.Tensor:
    """`separate_taps` in plain PyTorch."""
    by_parity = widen(gradient).unflatten(0, (2, 2, -1)).permute(1, 5, 0, 4, 2, 3)
    rows = _separate(by_parity).movedim(0, -1)           # [p, a, K, C, 3]
    return _separate(rows).permute(1, 2, 0, 3).to(gradient.dtype, memory_format=torch.channels_last)


def _combine(weight, axis):
    """[parity, pixel, ...]: what an output of either parity sees of its two pixels, along one axis of three taps."""
    w0, w1, w2 = weight.unbind(axis)
    return torch.stack((torch.stack((w0, w1 + w2)), torch.stack((w0 + w1, w2))))


def _separate(seen):
    """The adjoint of `_combine`: [parity, pixel, ...] -> [3, ...]."""
    return torch.stack((seen[0, 0] + seen[1, 0], seen[0, 1] + seen[1, 0], seen[0, 1] + seen[1, 1]))


def interleave_reference(z: torch.Tensor) -> torch.Tensor:
    """z [N, H + 1, W + 1, 4K] -> y [N, 2H, 2W, K]."""
    N, H, W, _ = z.shape
    by_parity = z.unflatten(3, (2, 2, -1))
    y = torch.stack([torch.stack([by_parity[:, p:H - 1 + p, q:W - 1 + q, p, q] for q in (0, 1)], 3)
                     for p in (0, 1)], 2)
    return y.reshape(N, 2 * H - 2, 2 * W - 2, -1)


def separate_reference(dy: torch.Tensor) -> torch.Tensor:
    """The adjoint of `interleave_reference`: dy [N, 2H, 2W, K] -> dz [N, H + 1, W + 1, 4K]."""
    N, H, W, K = dy.shape[0], dy.shape[1] // 2, dy.shape[2] // 2, dy.shape[3]
    dz = dy.new_zeros(N, H + 1, W + 1, 2, 2, K)
    for p in (0, 1):
        for q in (0, 1):
            dz[:, p:H + p, q:W + q, p, q] = dy[:, p::2, q::2]
    return dz.flatten(3)


@triton.jit
def _separate_kernel(p_dy, p_dz, R, H, W, K, BR: tl.constexpr, BC: tl.constexpr):
    """Rows of dz are (n, i, j, p, q); outside the image they are 0."""
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    o_parity, o_place = o_r % 4, o_r // 4
    o_n = o_place // ((H + 1) * (W + 1))
    o_u = 2 * (o_place // (W + 1) % (H + 1)) - o_parity // 2
    o_v = 2 * (o_place % (W + 1)) - o_parity % 2
    inside = (o_u >= 0) & (o_u < 2 * H) & (o_v >= 0) & (o_v < 2 * W)
    m = (o_r < R)[:, None] & (o_c < K)[None, :]
    o_y = (o_n * 2 * H + o_u) * 2 * W + o_v
    b_dy = tl.load(p_dy + o_y[:, None] * K + o_c[None, :], mask=m & inside[:, None], other=0.0)
    tl.store(p_dz + o_r[:, None] * K + o_c[None, :], b_dy, mask=m)


@triton.jit
def _combine_taps_kernel(p_weight, p_combined, K, C, BC: tl.constexpr):
    """An output of parity p sees tap i at its pixel (i + 1 - p) // 2."""
    i_k = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    for p in tl.static_range(2):
        for q in tl.static_range(2):
            for pixel in tl.static_range(4):
                b_sum = tl.zeros([BC], tl.float32)
                for tap in tl.static_range(9):
                    if (tap // 3 + 1 - p) // 2 * 2 + (tap % 3 + 1 - q) // 2 == pixel:
                        b_sum += tl.load(p_weight + (i_k * 9 + tap) * C + o_c, mask=o_c < C).to(tl.float32)
                o = (((p * 2 + q) * K + i_k) * 4 + pixel) * C + o_c
                tl.store(p_combined + o, b_sum.to(p_combined.dtype.element_ty), mask=o_c < C)


@triton.jit
def _separate_taps_kernel(p_gradient, p_separated, K, C, BC: tl.constexpr):
    i_k = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    for tap in tl.static_range(9):
        b_sum = tl.zeros([BC], tl.float32)
        for p in tl.static_range(2):
            for q in tl.static_range(2):
                pixel = (tap // 3 + 1 - p) // 2 * 2 + (tap % 3 + 1 - q) // 2
                o = (((p * 2 + q) * K + i_k) * 4 + pixel) * C + o_c
                b_sum += tl.load(p_gradient + o, mask=o_c < C).to(tl.float32)
        tl.store(p_separated + (i_k * 9 + tap) * C + o_c, b_sum.to(p_separated.dtype.element_ty), mask=o_c < C)


def combine_taps(weight: torch.Tensor) -> torch.Tensor:
    """A 3x3 kernel [K, C, 3, 3] as the 2x2 one [4K, C, 2, 2], channels last, sums in fp32."""
    K, C = weight.shape[:2]
    require_shapes("combine_taps", (weight, (K, C, 3, 3)))
    weight = weight.contiguous(memory_format=torch.channels_last)
    combined = weight.new_empty(4 * K, 2, 2, C).permute(0, 3, 1, 2)
    _combine_taps_kernel[(K, triton.cdiv(C, _TAPS))](p_weight=weight, p_combined=combined, K=K, C=C, BC=_TAPS,
                                                     num_warps=1)
    return combined


def separate_taps(gradient: torch.Tensor) -> torch.Tensor:
    """The gradient [K, C, 3, 3] of a 3x3 kernel, channels last, from that of its 2x2 one: the adjoint of
    `combine_taps`."""
    K, C = gradient.shape[0] // 4, gradient.shape[1]
    require_shapes("separate_taps", (gradient, (4 * K, C, 2, 2)))
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    separated = gradient.new_empty(K, 3, 3, C).permute(0, 3, 1, 2)
    _separate_taps_kernel[(K, triton.cdiv(C, _TAPS))](p_gradient=gradient, p_separated=separated, K=K, C=C, BC=_TAPS,
                                                      num_warps=1)
    return separated


def interleave(z: torch.Tensor, bias: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """y [N, 2H, 2W, K] + bias [K] out of z [N, H + 1, W + 1, 4K], and y's statistics as `add_channel_stats` has them.

    ValueError for shapes that do not fit, or strides.
    """
    return add_channel_stats(z, bias=bias, interleaved=True)


def separate(dy: torch.Tensor) -> torch.Tensor:
    """The gradient [N, H + 1, W + 1, 4K] of z from that of y [N, 2H, 2W, K]. ValueError if dy is not contiguous."""
    require("separate", (dy, dy.shape))
    N, H, W, K = dy.shape[0], dy.shape[1] // 2, dy.shape[2] // 2, dy.shape[3]
    dz = dy.new_empty(N, H + 1, W + 1, 4 * K)
    R = dz.numel() // K
    _separate_kernel[(triton.cdiv(R, _ROWS), triton.cdiv(K, _CHANNELS))](
        p_dy=dy, p_dz=dz, R=R, H=H, W=W, K=K, BR=_ROWS, BC=_CHANNELS, num_warps=4)
    return dz
