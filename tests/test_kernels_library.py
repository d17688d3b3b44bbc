"""Norms and GEGLU in CUDA graphs, and on machines that run no kernel."""

import pytest
import torch
from conftest import environment
from helpers_kernels import output_gradients, random_tensors
from sidfast.kernels.backend import triton_runs_on
from sidfast.kernels.geglu import geglu
from sidfast.kernels.group_norm import group_norm
from sidfast.kernels.layer_norm import layer_norm

X, C = (2, 35, 12), (12,)
FUNCTIONS = {
    "group_norm": lambda x, weight, bias, **_: group_norm(x, weight, bias, 4)[0],
    "group_norm, all": lambda x, weight, bias, shift, other, **_: group_norm(
        x, torch.cat((weight, bias)), torch.cat((bias, weight)), 4, silu=True, shift=shift, other=other)[0],
    "layer_norm": lambda x, weight, bias, **_: layer_norm(x, weight, bias)[1],
    "layer_norm, residual": lambda x, weight, bias, other, **_: torch.cat(layer_norm(x, weight, bias, residual=other)),
    "geglu": lambda x, **_: geglu(x),
}


def tensors_on(device):
    return random_tensors(device, torch.float32, x=X, weight=C, bias=C, shift=(2, 24), other=X)


def run(compute, tensors):
    y = compute(**tensors)
    return y, *torch.autograd.grad(y, list(tensors.values()), output_gradients((y,), y.dtype), allow_unused=True)


def same(a, b):
    return (a is None and b is None) or torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FUNCTIONS)
def test_cuda_graph(name):
    """Captured once, replayed on new values."""
    tensors, stream = tensors_on("cuda"), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):                      # compiles the kernels, which a capture cannot
        run(FUNCTIONS[name], tensors)
    torch.cuda.current_stream().wait_stream(stream)
    dy = torch.randn_like(FUNCTIONS[name](**tensors))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = FUNCTIONS[name](**tensors)
        got = y, *torch.autograd.grad(y, list(tensors.values()), dy, allow_unused=True)
    with torch.no_grad():
        tensors["x"].copy_(torch.randn_like(tensors["x"]))
    graph.replay()
    y = FUNCTIONS[name](**tensors)
    want = y, *torch.autograd.grad(y, list(tensors.values()), dy, allow_unused=True)
    assert all(same(a, b) for a, b in zip(got, want, strict=True))


def test_without_gpu_the_references_are_used(monkeypatch):
    monkeypatch.setattr("sidfast.kernels.backend.INTERPRETED", False)
    for module in ("group_norm", "layer_norm", "geglu"):
        monkeypatch.delattr(f"sidfast.kernels.{module}.{module}_forward")
    tensors = tensors_on("cpu")
    assert not triton_runs_on(tensors["x"])
    for compute in FUNCTIONS.values():
        run(compute, tensors)


def test_training_in_tests_does_not_interpret():
    assert "TRITON_INTERPRET" not in environment(0)
