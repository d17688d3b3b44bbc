"""What the Triton kernels share: where they run, how they see latents, how programs add up."""

import os

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def triton_runs_on(x):
    """Whether kernels take tensor x: it is on a GPU, or Triton's interpreter is on (TRITON_INTERPRET=1)."""
    return x.is_cuda or INTERPRETED


def flat_like(x, *others):
    """The tensors with one order of elements inside a sample, that of x [N, C, H, W], so that kernels can run along
    memory: channels last if x is, plain otherwise. Those that lie otherwise are copied."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    order = torch.channels_last if channels_last and not x.is_contiguous() else torch.contiguous_format
    return tuple(v.contiguous(memory_format=order) for v in (x, *others))


@triton.jit
def last_to_finish(p_done, n):
    """Whether this program is the last of n to come here; what the others stored before can then be read.

    p_done: an int32 that starts at 0.
    """
    tl.debug_barrier()                                   # all threads have stored before one says so
    return tl.atomic_add(p_done, 1, sem="acq_rel") == n - 1


@triton.jit
def sum_parts(p_part, n, STRIDE: tl.constexpr, B: tl.constexpr):
    """The sum of n fp32 numbers that other programs stored, STRIDE apart; always in the same order."""
    b_sum = tl.zeros([B], tl.float32)
    for start in range(0, n, B):
        i = start + tl.arange(0, B)
        b_sum += tl.load(p_part + i * STRIDE, mask=i < n, other=0.0, cache_modifier=".cg")
    return tl.sum(b_sum)
