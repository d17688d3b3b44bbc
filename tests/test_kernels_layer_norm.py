"""LayerNorm with the additions before it: outputs and every gradient against float64."""

import eager
import pytest
import torch
from helpers_kernels import BOUND, DEVICES, DTYPES, assert_matches, error, random_tensors, widened
from hypothesis import given, settings
from hypothesis import strategies as st
from sidfast.kernels.layer_norm import layer_norm, layer_norm_backward, layer_norm_forward, layer_norm_reference

SHAPES = [(1, 8), (3, 35, 66), (2, 7, 5, 33), (50, 320), (5, 1280), (2, 2100)]         # the last two: a row a program
ALL = [(shape, dtype) for shape in SHAPES for dtype in DTYPES if dtype == torch.float32 or shape != (5, 1280)]
LARGE = [(16, 4096, 320), (16, 256, 1280)]


def tensors_of(device, dtype, shape, residual=True, bias_of_x=False, **options):
    C = shape[-1:]
    return random_tensors(device, dtype, x=shape, weight=C, bias=C, residual=shape if residual else None,
                          bias_of_x=C if bias_of_x else None, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("shape, dtype", ALL, ids=str)
def test_layer_norm(shape, residual, dtype, device):
    assert_matches(layer_norm, eager.layer_norm, tensors_of(device, dtype, shape, residual))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_layer_norm_at_full_size(shape, dtype):
    assert_matches(layer_norm, eager.layer_norm, tensors_of("cuda", dtype, shape))


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=10, derandomize=True, deadline=None)
@given(T=st.integers(1, 60), C=st.integers(8, 300), residual=st.booleans(), bias_of_x=st.booleans())
def test_any_shape(device, T, C, residual, bias_of_x):
    assert_matches(layer_norm, None, tensors_of(device, torch.float32, (T, C), residual, bias_of_x))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normalises_what_it_stores(dtype, device):
    """Backward sees h only as stored: its mean and deviation are the ones to use."""
    v = tensors_of(device, dtype, (35, 66))
    h, _, mean, rstd = layer_norm_forward(v["x"], v["weight"], v["bias"], 1e-5, v["residual"])
    h = h.detach().double()
    assert error(mean, h.mean(1)) < BOUND
    assert error(rstd, (h.var(1, correction=0) + 1e-5).rsqrt()) < BOUND


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_of_the_input(dtype, residual, device):
    """Added before anything is rounded."""
    v = tensors_of(device, dtype, (35, 66), residual)
    added = random_tensors(device, dtype, seed=1, bias_of_x=(66,))
    h, y, *_ = layer_norm_forward(v["x"], v["weight"], v["bias"], 1e-5, v.get("residual"), **added)
    want_h, want_y = layer_norm_reference(**widened(v | added))
    bound = {torch.float32: BOUND, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert h.dtype == y.dtype == dtype and error(h, want_h) < bound
    assert error(y, want_y) < 2 * bound                  # (of h as rounded)


@pytest.mark.parametrize("device", DEVICES)
def test_large_mean(device):
    """Mean 1000, deviation 1: off by no more than the spacing of fp32 numbers there, 6e-5, explains."""
    tensors = tensors_of(device, torch.float32, (35, 66), residual=False, mean=1e3)
    assert_matches(layer_norm, None, tensors, bound=1e-4)


def host(device, dtype, affine=True):
    """The tensors, the gradients of y and h, and what layer_norm_backward makes of them, its sums in fp32."""
    v = tensors_of(device, dtype, (90, 66))
    h, _, mean, rstd = layer_norm_forward(v["x"], v["weight"], v["bias"], 1e-5, v["residual"])
    dy, dh = random_tensors(device, dtype, seed=1, dy=h.shape, dh=h.shape).values()
    return v, dy, dh, layer_norm_backward(dy, h, mean, rstd, v["weight"].float(), dh, affine)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sum_of_the_input_gradient(dtype, device):
    """It is the gradient of a bias added to x. As precise as fp32 but for the rounding of h itself."""
    v, dy, dh, (*_, dh_sum) = host(device, dtype)
    v = widened(v)
    h = (v["x"] + v["residual"]).detach().requires_grad_()
    outputs = layer_norm(h, v["weight"], v["bias"])
    (want,) = torch.autograd.grad(outputs, h, (dh.double(), dy.double()))
    assert dh_sum.dtype == torch.float32
    assert error(dh_sum, want.sum(0)) < {torch.float32: BOUND, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_frozen_network_has_the_same_input_gradient(dtype, device):
    """Also: every run gives the same bits."""
    *_, (dh, *sums) = host(device, dtype)
    *_, (dh_again, *sums_again) = host(device, dtype)
    *_, (dh_frozen, *nothing) = host(device, dtype, affine=False)
    assert nothing == [None, None, None]
    assert torch.equal(dh, dh_frozen) and torch.equal(dh, dh_again)
    assert all(torch.equal(a, b) for a, b in zip(sums, sums_again, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("used", [0, 1], ids=["h only", "y only"])
def test_one_output_used(used, device):
    tensors = tensors_of(device, torch.float32, (35, 66), bias_of_x=True)
    wide = widened(tensors)
    dy = random_tensors(device, torch.float32, seed=1, dy=(35, 66))["dy"].detach()
    got = torch.autograd.grad(layer_norm(**tensors)[used], list(tensors.values()), dy, allow_unused=True)
    want = torch.autograd.grad(layer_norm(**wide)[used], list(wide.values()), dy.double(), allow_unused=True)
    for name, g, w in zip(tensors, got, want, strict=True):
        assert (g is None) == (w is None), name
        assert g is None or error(g, w) < BOUND, name


def test_errors():
    w = torch.randn(4)
    with pytest.raises(ValueError, match=r"strides \(1, 6\), should be contiguous"):
        layer_norm_forward(torch.randn(4, 6).T, w, w, 1e-5)
    with pytest.raises(ValueError, match=r"shape \(4,\) should be \(6,\)"):
        layer_norm_forward(torch.randn(4, 6), w, w, 1e-5)
    with pytest.raises(ValueError, match=r"shape \(5,\) should be \(4,\)"):
        layer_norm_forward(torch.randn(6, 4), w, w, 1e-5, bias_of_x=torch.randn(5))


def test_reference_is_pytorchs():
    tensors = widened(tensors_of("cpu", torch.float32, (35, 66)))
    for got, want in zip(layer_norm(**tensors), eager.layer_norm(**tensors), strict=True):
        assert error(got, want) < 1e-12
