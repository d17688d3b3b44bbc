"""The sum of gradients over micro-batches: sums += gradient, or nothing if a flag in the GPU's memory says so.

Several parameters' in one launch: a network has hundreds of small ones, and a launch takes longer than adding them.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from sidfast.kernels.backend import TYPES

_BLOCK = 4096


def accumulate_reference(sums: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], wanted: torch.Tensor) -> None:
    """`accumulate` in plain PyTorch."""
    for s, gradient in zip(sums, gradients, strict=True):
        s.add_(torch.where(wanted, gradient, torch.zeros_like(gradient)))


def accumulate(sums: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], wanted: torch.Tensor) -> None:
    """Add each of `gradients` to its sum, in place and in the sum's type, if `wanted` (a bool, a tensor) holds.

    Lists of tensors, as many of either and two by two of one shape (ValueError if not), all sums of one type and all
    gradients of one; sums dense in memory, in any order of dimensions, and none twice. What is not wanted may hold NaN.
    The host does not wait for the flag. The kernel runs on a GPU alone: Triton's interpreter would take seconds for a
    network's parameters (tests call `launch`). It is compiled for each length of the lists and each pattern of sizes
    that 16 divides: a few dozen tensors at once are enough.
    """
    for s, gradient in zip(sums, gradients, strict=True):
        if gradient.shape != s.shape:
            raise ValueError(f"accumulate: a gradient of shape {tuple(gradient.shape)} for sums of {tuple(s.shape)}")
    add = launch if sums[0].is_cuda and sums[0].dtype in TYPES else accumulate_reference
    add(sums, gradients, wanted)


def launch(sums: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], wanted: torch.Tensor) -> None:
    """`accumulate` by the kernel, on what it has checked; a gradient in another order of dimensions is copied first."""
    gradients = [_laid_out_like(s, gradient) for s, gradient in zip(sums, gradients, strict=True)]
    sizes = [s.numel() for s in sums]
    blocks = sum(triton.cdiv(n, _BLOCK) for n in sizes)
    _accumulate_kernel[(blocks,)](wanted.view(torch.uint8), tuple(sums), tuple(gradients), tuple(sizes), _BLOCK,
                                  num_warps=8)


def _laid_out_like(sums, gradient):
    if all(a == b for a, b, n in zip(gradient.stride(), sums.stride(), sums.shape, strict=True) if n > 1):
        return gradient
    return torch.empty_like(sums, dtype=gradient.dtype).copy_(gradient)


@triton.jit
def _accumulate_kernel(p_wanted, sums, gradients, sizes, B: tl.constexpr):
    """A block of one tensor in each program: blocks are counted through, from tensor to tensor."""
    if tl.load(p_wanted) != 0:
        i_block = tl.program_id(0)
        p_sums, p_gradient, n, first = sums[0], gradients[0], sizes[0], 0
        start = tl.cdiv(n, B)
        for j in tl.static_range(1, len(sums)):
            after = i_block >= start
            p_sums, p_gradient = tl.where(after, sums[j], p_sums), tl.where(after, gradients[j], p_gradient)
            n, first = tl.where(after, sizes[j], n), tl.where(after, start, first)
            start += tl.cdiv(sizes[j], B)
        i = (i_block - first).to(tl.int64) * B + tl.arange(0, B)
        b_sums = tl.load(p_sums + i, mask=i < n)
        b_gradient = tl.load(p_gradient + i, mask=i < n).to(b_sums.dtype)
        tl.store(p_sums + i, b_sums + b_gradient, mask=i < n)
