"""The sum of gradients over micro-batches: sums += gradient, or nothing if a flag in the GPU's memory says so."""

import torch
import triton
import triton.language as tl
from sidfast.kernels.backend import TYPES

_BLOCK = 4096


def accumulate_reference(sums, gradient, wanted):
    """`accumulate` in plain PyTorch."""
    sums.add_(torch.where(wanted, gradient, torch.zeros_like(gradient)))


def accumulate(sums, gradient, wanted):
    """Add `gradient` to `sums`, in place and in the type of `sums`, if `wanted` (a bool, a tensor) holds.

    Both of one shape (ValueError if not); `sums` dense in memory, in any order of dimensions. What is not wanted may
    hold NaN. The host does not wait for the flag. The kernel runs on a GPU alone: Triton's interpreter would take
    seconds for a network's parameters (tests call `launch`).
    """
    if gradient.shape != sums.shape:
        raise ValueError(f"accumulate: a gradient of shape {tuple(gradient.shape)} for sums of {tuple(sums.shape)}")
    add = launch if sums.is_cuda and sums.dtype in TYPES else accumulate_reference
    add(sums, gradient, wanted)


def launch(sums, gradient, wanted):
    """`accumulate` by the kernel, on what it has checked; a gradient in another order of dimensions is copied first."""
    if any(a != b for a, b, n in zip(gradient.stride(), sums.stride(), sums.shape, strict=True) if n > 1):
        gradient = torch.empty_like(sums, dtype=gradient.dtype).copy_(gradient)
    n = sums.numel()
    _accumulate_kernel[(triton.cdiv(n, _BLOCK),)](sums, gradient, wanted.view(torch.uint8), n, _BLOCK, num_warps=8)


@triton.jit
def _accumulate_kernel(p_sums, p_gradient, p_wanted, n, B: tl.constexpr):
    if tl.load(p_wanted) != 0:
        i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
        b_sums = tl.load(p_sums + i, mask=i < n)
        b_gradient = tl.load(p_gradient + i, mask=i < n).to(b_sums.dtype)
        tl.store(p_sums + i, b_sums + b_gradient, mask=i < n)
