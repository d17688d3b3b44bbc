"""A kernel against its reference in float64 ("the truth"), on random inputs and random output gradients."""

import pytest
import torch
from sidfast.kernels.backend import INTERPRETED

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter is off")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BOUND = 1e-5                                             # relative norm error of fp32
FACTOR = 1.5                                             # 16 bit: against the error of eager PyTorch in the same type


def random_tensors(device, dtype, seed=0, mean=0.0, **shapes):
    """Named leaves of the given shapes, around `mean` if they are x or other; a shape of None gives None."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name, shape):
        x = torch.randn(shape, generator=generator) + (mean if name in ("x", "other") else 0)
        return x.to(device, dtype).requires_grad_()

    return {name: None if shape is None else draw(name, shape) for name, shape in shapes.items()}


def widened(tensors):
    return {name: None if v is None else v.detach().double().requires_grad_() for name, v in tensors.items()}


def output_gradients(outputs, dtype, seed=1):
    """Random gradients, exact in `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(y.shape, generator=generator).to(dtype).to(y) for y in outputs]


def value_and_grads(compute, tensors, dtype):
    """{name: value}: the outputs y0, y1, ... of compute(**tensors), and a gradient for each tensor."""
    outputs = compute(**tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    leaves = {name: v for name, v in tensors.items() if v is not None}
    grads = torch.autograd.grad(outputs, list(leaves.values()), output_gradients(outputs, dtype))
    return {f"y{i}": y.detach() for i, y in enumerate(outputs)} | {
        f"d{name}": g for name, g in zip(leaves, grads, strict=True)}


def error(got, want):
    """Norm error relative to `want` or, where that is 0 by its nature (a shift of a group of one channel), to ones."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, not {tuple(want.shape)}"
    size, ones = want.double().norm().item(), want.numel() ** 0.5
    return (got.double() - want.double()).norm().item() / (size if size > 1e-9 * ones else ones)


def assert_matches(compute, eager, tensors, bound=BOUND):
    """Outputs and gradients of compute against compute in float64, where it is the reference.

    fp32: within `bound`. bf16, fp16: within FACTOR of the error of `eager`, or of rounding alone; twice that for bf16
    in the interpreter, which cuts bits off where the hardware rounds.
    """
    dtype, device = tensors["x"].dtype, tensors["x"].device.type
    got = value_and_grads(compute, tensors, dtype)
    want = value_and_grads(compute, widened(tensors), dtype)
    usual = {} if dtype == torch.float32 else value_and_grads(eager, tensors, dtype)
    factor = FACTOR * (2 if dtype == torch.bfloat16 and device == "cpu" else 1)
    failures = []
    for name in want:
        assert got[name].dtype == dtype, f"{name} is {got[name].dtype}"
        off, rounding = error(got[name], want[name]), error(want[name].to(dtype), want[name])
        limit = factor * max(error(usual[name], want[name]), rounding) if usual else bound
        if not off <= limit:
            failures.append(f"{name}: {off:.1e} > {limit:.1e}")
    assert not failures, "; ".join(failures)
