"""Nearest-neighbour doubling against PyTorch's own."""

import pytest
import torch
from helpers_kernels import DEVICES, DTYPES, assert_matches, random_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from sidfast.kernels.upsample import double


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_double(dtype, device):
    """Exactly PyTorch's pixels; gradients as near to float64 as sums of four numbers allow."""
    tensors = random_tensors(device, dtype, x=(2, 5, 3, 132))
    x = tensors["x"].detach()
    want = torch.nn.functional.interpolate(x.permute(0, 3, 1, 2), scale_factor=2, mode="nearest").permute(0, 2, 3, 1)
    assert torch.equal(double(x), want)
    assert_matches(double, double, tensors)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=10, derandomize=True, deadline=None)
@given(N=st.integers(1, 3), H=st.integers(1, 9), W=st.integers(1, 9), C=st.integers(1, 200))
def test_any_shape(device, N, H, W, C):
    assert_matches(double, None, random_tensors(device, torch.float32, x=(N, H, W, C)))


def test_error():
    with pytest.raises(ValueError, match=r"double: .* contiguous"):
        double(torch.randn(1, 4, 2, 6).transpose(1, 2))
