"""GEGLU: output, gradient and its sums against float64."""

import eager
import pytest
import torch
from diffusers.models.activations import GEGLU
from helpers_kernels import BOUND, DEVICES, DTYPES, assert_matches, error, random_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from sidfast.kernels.geglu import geglu, geglu_backward, geglu_forward

SHAPES = [(1, 34), (3, 35, 66), (2, 3, 5, 258), (20, 2560)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_geglu(shape, dtype, device):
    assert_matches(geglu, eager.geglu, random_tensors(device, dtype, x=shape))


@pytest.mark.parametrize("device", DEVICES)
def test_products_that_would_overflow(device):
    """Half of the input is a closed gate: nothing comes through, however large the other half."""
    x = torch.tensor([[1e20, 3.0, -1e20, -1e19]], device=device, requires_grad=True)
    y = geglu(x)
    [dx] = torch.autograd.grad(y, x, torch.full_like(y, 1e20))
    assert not y.any() and not dx.any()
    assert torch.equal(y, eager.geglu(x))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_geglu_at_full_size(dtype):
    assert_matches(geglu, eager.geglu, random_tensors("cuda", dtype, x=(16, 4096, 2560)))


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=10, derandomize=True, deadline=None)
@given(T=st.integers(1, 70), F=st.integers(1, 300))
def test_any_shape(device, T, F):
    assert_matches(geglu, None, random_tensors(device, torch.float32, x=(T, 2 * F)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_the_gradient(dtype, device):
    """fp32 throughout, whatever the type; the gradient is the same bits without them, and every time."""
    x, dy = random_tensors(device, dtype, x=(135, 66), dy=(135, 33)).values()
    dx, sums = geglu_backward(dy, x, sums_type=torch.float32)
    wide = x.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(geglu(wide), wide, dy.double())
    assert error(sums, want.sum(0)) < BOUND
    again, sums_again = geglu_backward(dy, x, sums_type=torch.float32)
    alone, nothing = geglu_backward(dy, x)
    assert nothing is None
    assert torch.equal(dx, again) and torch.equal(dx, alone) and torch.equal(sums, sums_again)


@pytest.mark.parametrize("device", DEVICES)
def test_a_bias_in_the_input_gets_its_gradient(device):
    x, bias, dy = random_tensors(device, torch.float32, x=(2, 35, 66), bias=(66,), dy=(2, 35, 33)).values()
    dx, dbias = torch.autograd.grad(geglu(x, bias), (x, bias), dy)
    assert error(dbias, dx.double().sum((0, 1))) < BOUND


def test_errors():
    with pytest.raises(ValueError, match="7 channels have no two halves"):
        geglu(torch.randn(3, 7))
    with pytest.raises(ValueError, match=r"strides \(1, 6\), should be contiguous"):
        geglu_forward(torch.randn(4, 6).T)
    with pytest.raises(ValueError, match=r"shape \(4, 6\) should be \(4, 3\)"):
        geglu_backward(torch.randn(4, 6), torch.randn(4, 6))


def test_reference_is_diffusers():
    module = GEGLU(6, 8).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    assert error(geglu(module.proj(x)), module(x)) < 1e-12
