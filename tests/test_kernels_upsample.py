"""Doubling and a 3x3 convolution as one 2x2 convolution, against doubling and convolving."""

import pytest
import torch
from helpers_kernels import BOUND, DEVICES, DTYPES, error
from hypothesis import given, settings
from hypothesis import strategies as st
from sidfast.kernels.channel_stats import add_channel_stats
from sidfast.kernels.upsample import (
    combine_taps,
    combine_taps_reference,
    interleave,
    interleave_reference,
    separate,
    separate_reference,
    separate_taps,
    separate_taps_reference,
)
from torch.nn import functional as F


def test_two_by_two_is_three_by_three():
    """In float64: output and both gradients of doubling, then a 3x3 convolution with padding 1."""
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    want = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, padding=1)
    combined = combine_taps_reference(weight.detach()).requires_grad_()
    z = F.conv2d(x, combined, padding=1).permute(0, 2, 3, 1)
    got = interleave_reference(z).permute(0, 3, 1, 2)
    dy = torch.randn_like(want)
    dx_want, dweight_want = torch.autograd.grad(want, (x, weight), dy)
    dx, dcombined = torch.autograd.grad(got, (x, combined), dy)
    assert error(got, want) < 1e-12 and error(dx, dx_want) < 1e-12
    assert error(separate_taps_reference(dcombined), dweight_want) < 1e-12


def check_taps(device, dtype, K, C, channels_last):
    """Sums of four in fp32, rounded once; channels last whatever the input."""
    g = torch.Generator().manual_seed(0)
    order = torch.channels_last if channels_last else torch.contiguous_format
    for kernel, reference, shape in ((combine_taps, combine_taps_reference, (K, C, 3, 3)),
                                     (separate_taps, separate_taps_reference, (4 * K, C, 2, 2))):
        x = torch.randn(shape, generator=g).to(device, dtype).contiguous(memory_format=order)
        got, want = kernel(x), reference(x.double())
        assert got.dtype == dtype and got.is_contiguous(memory_format=torch.channels_last)
        cut = 2 if device == "cpu" else 1                # (the interpreter cuts bits off)
        assert error(got, want) < (BOUND if dtype == torch.float32 else cut * torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_taps(dtype, device):
    check_taps(device, dtype, 6, 300, True)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=10, derandomize=True, deadline=None)
@given(K=st.integers(1, 5), C=st.integers(1, 270), channels_last=st.booleans())
def test_taps_of_any_shape(device, K, C, channels_last):
    check_taps(device, torch.float32, K, C, channels_last)


def check(device, dtype, N, H, W, K):
    """`interleave` moves and adds exactly; its statistics are those of its result; `separate` is its adjoint."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(N, H + 1, W + 1, 4 * K, generator=g).to(device, dtype).requires_grad_()
    bias = torch.randn(K, generator=g).to(device, dtype)
    y, stats = interleave(z.detach(), bias)
    want = interleave_reference(z)
    assert torch.equal(interleave(z.detach())[0], want)
    assert torch.equal(y, add_channel_stats(want.detach(), bias=bias)[0])
    assert error(stats, add_channel_stats(y)[1]) < BOUND
    dy = torch.randn(y.shape, generator=g).to(device, dtype)
    assert torch.equal(separate(dy), torch.autograd.grad(want, z, dy)[0])
    assert torch.equal(separate(dy), separate_reference(dy))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_interleave_and_separate(dtype, device):
    check(device, dtype, 2, 5, 6, 132)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=10, derandomize=True, deadline=None)
@given(N=st.integers(1, 3), H=st.integers(1, 9), W=st.integers(1, 9), K=st.integers(1, 150))
def test_any_shape(device, N, H, W, K):
    check(device, torch.float32, N, H, W, K)


def test_error():
    with pytest.raises(ValueError, match=r"separate: .* contiguous"):
        separate(torch.randn(1, 4, 2, 6).transpose(1, 2))
    with pytest.raises(ValueError, match=r"add_channel_stats: .* should be \(3,\)"):
        interleave(torch.randn(1, 4, 2, 12), torch.randn(4))
    with pytest.raises(ValueError, match=r"combine_taps: .* should be \(4, 3, 3, 3\)"):
        combine_taps(torch.randn(4, 3, 1, 1))
    with pytest.raises(ValueError, match=r"separate_taps: .* should be \(4, 3, 2, 2\)"):
        separate_taps(torch.randn(6, 3, 2, 2))
