"""Losses and networks against references, also across devices: comparisons that name what is off."""

import torch
from helpers_kernels import BOUND


def draw(shape, seed):
    """Normal numbers in float64 that fp32 holds exactly."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def value_and_grads(f, inputs, dy):
    """f(*inputs) and its gradients in all inputs against dy."""
    inputs = [v.detach().requires_grad_() for v in inputs]
    y = f(*inputs)
    return y.detach(), *torch.autograd.grad(y, inputs, dy)


def error(got, want):
    """Relative norm error, in float64."""
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, not {tuple(want.shape)}"
    return ((got - want).norm() / want.norm()).item()


def assert_close(name, got, want, bound):
    e = error(got, want)
    assert e <= bound, f"{name}: {e:.1e} > {bound:.1e}"


def assert_no_worse(name, got, plain, want):
    """`got` is as near to `want` as PyTorch's own result in the same types.

    (Triton's interpreter cuts fp32 off to bf16 where a GPU and PyTorch round: twice the error.)
    """
    cut_off = got.dtype == torch.bfloat16 and not got.is_cuda
    e, allowed = error(got, want), (2.2 if cut_off else 1.1) * error(plain, want) + BOUND
    assert e <= allowed, f"{name}: {e:.1e} > {allowed:.1e}"
