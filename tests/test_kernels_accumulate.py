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
@given(shapes=st.lists(SIZES, min_size=1, max_size=5), last=st.booleans(), gradient_last=st.booleans(),
       wanted=st.booleans(), seed=st.integers(0, 99))
def test_sum(place, kind, shapes, last, gradient_last, wanted, seed):
    """In fp32 the sum of one addition is exact to rounding, so all agree bit for bit."""
    torch.manual_seed(seed)

    def laid_out(dtype, channels_last):
        return [x.contiguous(memory_format=torch.channels_last) if channels_last and x.dim() == 4 else x
                for x in (torch.randn(shape, device=place, dtype=dtype) for shape in shapes)]

    sums, gradients = laid_out(torch.float32, last), laid_out(kind, gradient_last)
    want = [s + g.float() if wanted else s.clone() for s, g in zip(sums, gradients, strict=True)]
    assert_sums(sums, gradients, torch.tensor(wanted, device=place), want)


@pytest.mark.parametrize("place", PLACES)
def test_several_with_more_than_a_block(place):
    """Each of a few blocks, the last one ragged, beside some of one block, of one element and of none."""
    sums, gradients = ([torch.randn(n, device=place) for n in (1, 9000, 0, 4096, 4097, 5, 8192)] for _ in range(2))
    want = [s + g for s, g in zip(sums, gradients, strict=True)]
    assert_sums(sums, gradients, torch.tensor(True, device=place), want)


def assert_sums(sums, gradients, flag, want):
    for add in (launch, accumulate_reference, accumulate):
        got = [torch.empty_like(s).copy_(s) for s in sums]
        add(got, gradients, flag)
        assert all(torch.equal(a, b) and a.stride() == s.stride() for a, b, s in zip(got, want, sums, strict=True))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("value", (torch.nan, torch.inf))
def test_what_is_not_wanted_may_be_anything(place, value):
    sums, gradient = torch.ones(5000, device=place), torch.full((5000,), value, device=place)
    for add in (launch, accumulate_reference):
        add([sums], [gradient], torch.tensor(False, device=place))
    assert torch.equal(sums, torch.ones_like(sums))
    launch([sums], [gradient], torch.tensor(True, device=place))
    assert not sums.isfinite().any()


def test_lists_must_agree():
    with pytest.raises(ValueError, match="argument 2 is longer"):
        accumulate([torch.zeros(2)], [torch.zeros(2)] * 2, torch.tensor(True))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"a gradient of shape \(3,\) for sums of \(4,\)"):
        accumulate([torch.zeros(2), torch.zeros(4)], [torch.zeros(2), torch.zeros(3)], torch.tensor(True))
