"""Sums of gradients: the kernel against plain addition, in every order of dimensions, with a flag that says no."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sidfast.kernels.accumulate import accumulate, accumulate_reference, launch
from sidfast.kernels.backend import INTERPRETED, TYPES

PLACES = (pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter is off")),
          pytest.param("cuda", marks=pytest.mark.gpu))
SIZES = st.lists(st.integers(1, 9), min_size=0, max_size=4)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", TYPES, ids=str)
@settings(max_examples=10, deadline=None)
@given(shape=SIZES, last=st.booleans(), gradient_last=st.booleans(), wanted=st.booleans(), seed=st.integers(0, 99))
def test_sum(place, kind, shape, last, gradient_last, wanted, seed):
    """In fp32 the sum of one addition is exact to rounding, so all agree bit for bit."""
    torch.manual_seed(seed)

    def laid_out(dtype, channels_last):
        x = torch.randn(shape, device=place, dtype=dtype)
        return x.contiguous(memory_format=torch.channels_last) if channels_last and len(shape) == 4 else x

    sums, gradient = laid_out(torch.float32, last), laid_out(kind, gradient_last)
    flag = torch.tensor(wanted, device=place)
    want = sums + gradient.float() if wanted else sums.clone()
    for add in (launch, accumulate_reference, accumulate):
        got = torch.empty_like(sums).copy_(sums)
        add(got, gradient, flag)
        assert torch.equal(got, want) and got.stride() == sums.stride()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("value", (torch.nan, torch.inf))
def test_what_is_not_wanted_may_be_anything(place, value):
    sums, gradient = torch.ones(5000, device=place), torch.full((5000,), value, device=place)
    for add in (launch, accumulate_reference):
        add(sums, gradient, torch.tensor(False, device=place))
    assert torch.equal(sums, torch.ones_like(sums))
    launch(sums, gradient, torch.tensor(True, device=place))
    assert not sums.isfinite().any()


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"a gradient of shape \(3,\) for sums of \(4,\)"):
        accumulate(torch.zeros(4), torch.zeros(3), torch.tensor(True))
