"""Sums over positions and over rows against float64."""

import pytest
import torch
from helpers_kernels import BOUND, DEVICES, DTYPES, error, random_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from sidfast.kernels.channel_stats import (
    add_channel_stats,
    add_channel_stats_reference,
    column_sums,
    column_sums_reference,
    sum_rows,
)

SHAPES = [(1, 1, 1), (2, 5, 7, 66), (2, 135, 33), (1, 8, 16, 320)]


def draw(device, dtype, shape, mean=0.0):
    tensors = random_tensors(device, dtype, mean=mean, x=shape, residual=shape, bias=shape[-1:])
    return tuple(v.detach() for v in tensors.values())


def assert_right(y, stats, x, residual=None, bias=None):
    """y to the last bit where the processor rounds; the statistics are those of y as it was stored."""
    rounded, _ = add_channel_stats_reference(x, residual, bias)
    if y.dtype == torch.bfloat16 and not y.is_cuda:      # the interpreter cuts bits off
        torch.testing.assert_close(y, rounded, rtol=2**-7, atol=0)
    else:
        assert torch.equal(y, rounded)
    _, want = add_channel_stats_reference(y.double())
    assert error(stats[:, :, 0], want[:, :, 0]) < BOUND
    assert error(stats[:, :, 1], want[:, :, 1]) < BOUND


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_channel_stats(shape, dtype, device):
    x, residual, bias = draw(device, dtype, shape)
    for summands in ((x, residual, bias), (x, residual), (x, None, bias)):
        assert_right(*add_channel_stats(*summands), *summands)
    y, stats = add_channel_stats(x)
    assert y is x
    assert_right(y, stats, x)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=10, derandomize=True, deadline=None)
@given(N=st.integers(1, 3), S=st.integers(1, 200), C=st.integers(1, 140))
def test_any_shape(device, N, S, C):
    x, residual, bias = draw(device, torch.float32, (N, S, C))
    assert_right(*add_channel_stats(x, residual, bias), x, residual, bias)
    assert error(column_sums(x.flatten(0, 1)), column_sums_reference(x.flatten(0, 1).double())) < BOUND


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(dtype, device):
    x, residual, bias = draw(device, dtype, (2, 70, 66))
    y, stats = add_channel_stats(x, residual, bias)
    same, stats_again = add_channel_stats(x, residual, bias, out=x)
    assert same is x and torch.equal(x, y) and torch.equal(stats, stats_again)


@pytest.mark.parametrize("device", DEVICES)
def test_squares_do_not_cancel(device):
    """Mean 1000, deviation 1: sums of squares minus squares of sums would lose the first digit."""
    x, *_ = draw(device, torch.float32, (2, 135, 33), mean=1e3)
    assert_right(*add_channel_stats(x), x)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (35, 66), (1030, 130)], ids=str)
def test_column_sums(shape, dtype, device):
    x = random_tensors(device, dtype, x=shape)["x"].detach()
    sums = column_sums(x)
    assert sums.dtype == torch.float32
    assert error(sums, column_sums_reference(x.double())) < BOUND
    assert torch.equal(sums, column_sums(x))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 255, 256, 257, 700])
def test_sum_rows(rows, device):
    """What as many programs left; 256 rows at a time."""
    parts = random_tensors(device, torch.float32, x=(rows, 35))["x"].detach()
    assert error(sum_rows(parts, torch.float32), parts.double().sum(0)) < BOUND


def test_errors():
    with pytest.raises(ValueError, match=r"column_sums: .* contiguous"):
        column_sums(torch.randn(4, 6).T)
    with pytest.raises(ValueError, match=r"column_sums: .* is empty"):
        column_sums(torch.randn(0, 6))
    with pytest.raises(ValueError, match=r"add_channel_stats: .* contiguous"):
        add_channel_stats(torch.randn(2, 4, 6), residual=torch.randn(2, 6, 4).mT)
    with pytest.raises(ValueError, match=r"shape \(4,\) should be \(6,\)"):
        add_channel_stats(torch.randn(2, 4, 6), bias=torch.randn(4))
