"""GroupNorm: outputs and every gradient against float64."""

import eager
import pytest
import torch
from helpers_kernels import DEVICES, DTYPES, assert_matches, error, output_gradients, random_tensors, widened
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sidfast.kernels.channel_stats import add_channel_stats
from sidfast.kernels.group_norm import group_norm, group_norm_backward, group_norm_forward
from triton.runtime.jit import KernelInterface

CASES = {                                                # x, channels of `other`, groups
    "tiny": ((1, 5, 8), 0, 8),                           # a group is one channel
    "odd": ((2, 35, 66), 0, 3),
    "odd, image": ((2, 9, 15, 21), 0, 7),
    "odd, seam in a group": ((2, 135, 40), 26, 6),
    "one group": ((2, 70, 33), 1, 1),
    "chunks by and by": ((1, 320, 400), 200, 1),         # five, of which the programs that merge them hold two
    "sd": ((1, 8, 8, 160), 0, 16),                       # groups as large as those of Stable Diffusion, half as many
    "sd, skip": ((1, 4, 4, 160), 80, 16),
    "even": ((1, 4, 4, 128), 0, 16),                     # whole blocks
}
ALL = [(case, torch.float32) for case in CASES] + [
    (case, dtype) for case in ("odd, seam in a group", "sd, skip") for dtype in DTYPES[1:]]
LARGE = {"sd, 512 px": ((2, 64, 64, 320), 0, 32), "sd, 512 px, skip": ((2, 32, 32, 1280), 640, 32)}


def tensors_of(case, device, dtype, shift=True, **options):
    shape, more, _ = (CASES | LARGE)[case]
    C = shape[-1] + more
    return random_tensors(device, dtype, x=shape, weight=(C,), bias=(C,), shift=(shape[0], C) if shift else None,
                          other=(*shape[:-1], more) if more else None, **options)


def norm(groups, silu):
    return lambda x, weight, bias, **options: group_norm(x, weight, bias, groups, silu=silu, **options)[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("silu, shift", [(True, True), (False, False)], ids=["shift, silu", "plain"])
@pytest.mark.parametrize("case, dtype", ALL, ids=str)
def test_group_norm(case, dtype, silu, shift, device):
    groups = CASES[case][-1]
    assert_matches(norm(groups, silu), eager.group_norm(groups, silu), tensors_of(case, device, dtype, shift))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LARGE)
def test_group_norm_at_full_size(case, dtype):
    groups = LARGE[case][-1]
    assert_matches(norm(groups, True), eager.group_norm(groups, True), tensors_of(case, "cuda", dtype))


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=8, derandomize=True, deadline=None)
@given(data=st.data())
def test_any_shape(device, data):
    """Any split of the channels between two inputs, over any number of positions."""
    groups, size = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 20))
    N, S = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 140))
    C = groups * size
    more = data.draw(st.integers(0, C - 1))
    assume(S * size >= 8)                                # fewer values have a variance near 0 now and then
    silu, shift = data.draw(st.booleans()), data.draw(st.booleans())
    tensors = random_tensors(device, torch.float32, x=(N, S, C - more), weight=(C,), bias=(C,),
                             shift=(N, C) if shift else None, other=(N, S, more) if more else None)
    assert_matches(norm(groups, silu), None, tensors)


@pytest.mark.parametrize("device", DEVICES)
def test_large_mean(device):
    """Mean 1000, deviation 1: off by no more than the spacing of fp32 numbers there, 6e-5, explains."""
    assert_matches(norm(6, True), None, tensors_of("odd, seam in a group", device, torch.float32, mean=1e3), bound=1e-4)


def host(tensors, groups=6, silu=True, residuals=None, affine=True, shift=True):
    """y and the gradients (dxs, dweight, dbias, dshift) of the host functions, the last three in fp32."""
    xs, (weight, bias) = [tensors[k].detach() for k in ("x", "other")], (tensors[k].float() for k in ("weight", "bias"))
    stats = [add_channel_stats(x)[1] for x in xs]
    y, saved = group_norm_forward(xs, stats, weight, bias, groups, 1e-5, tensors["shift"], silu)
    (dy,) = output_gradients((y,), y.dtype)
    return y, group_norm_backward(dy, xs, saved, weight, bias, groups, silu, residuals, affine, shift)


@pytest.mark.parametrize("device", DEVICES)
def test_frozen_network_has_the_same_input_gradients(device):
    tensors = tensors_of("odd, seam in a group", device, torch.bfloat16)
    y, (dxs, *small) = host(tensors)
    y_again, (dxs_frozen, *nothing) = host(tensors, affine=False, shift=False)
    assert nothing == [None, None, None]
    assert all(torch.equal(a, b) for a, b in zip((y, *dxs), (y_again, *dxs_frozen), strict=True))
    assert all(v.dtype == torch.float32 for v in small)


@pytest.mark.parametrize("device", DEVICES)
def test_residual_gradients_are_added(device):
    tensors = tensors_of("odd, seam in a group", device, torch.float32)
    residual = torch.randn(tensors["other"].shape, generator=torch.Generator().manual_seed(2)).to(device)
    _, (plain, *_) = host(tensors)
    _, (both, *_) = host(tensors, residuals=[None, residual])
    assert torch.equal(both[0], plain[0])
    assert error(both[1], plain[1].double() + residual.double()) < 1e-6


@pytest.mark.parametrize("device", DEVICES)
def test_every_run_gives_the_same_bits(device):
    tensors = tensors_of("odd, seam in a group", device, torch.float32)
    y, (dxs, *small) = host(tensors)
    y_again, (dxs_again, *small_again) = host(tensors)
    assert all(torch.equal(a, b) for a, b in zip((y, *dxs, *small), (y_again, *dxs_again, *small_again), strict=True))


def test_images_of_any_size(monkeypatch):
    """CUDA's grids have 65,535 programs at most in all directions but the first."""
    grids = []
    monkeypatch.setattr(KernelInterface, "__getitem__", lambda kernel, grid: lambda **_: grids.append(grid))
    x = torch.empty(1, 2048, 2048, 128, device="meta", requires_grad=True)
    weight = torch.empty(128, device="meta")
    y, saved = group_norm_forward([x], [add_channel_stats(x)[1]], weight, weight, 32, 1e-5)
    group_norm_backward(y, [x], saved, weight, weight, 32)
    assert len(grids) > 5 and all(size < 2**16 for grid in grids for size in grid[1:])


@pytest.mark.parametrize("device", DEVICES)
def test_some_gradients_only(device):
    """A frozen layer of the public function: gradients of x alone, equal to those among all."""
    tensors = tensors_of("odd, seam in a group", device, torch.float32)
    compute = norm(6, True)
    y = compute(**tensors)
    dy = output_gradients((y,), y.dtype)
    want = torch.autograd.grad(y, tensors["x"], dy)
    frozen = {name: v if name == "x" else v.detach() for name, v in tensors.items()}
    assert torch.equal(*torch.autograd.grad(compute(**frozen), tensors["x"], dy), *want)


@pytest.mark.parametrize("device", DEVICES)
def test_inputs_come_back(device):
    """Unchanged; what others make of them adds to their gradients, also where y itself is unused."""
    tensors = random_tensors(device, torch.float32, x=(1, 6, 5), other=(1, 6, 3), weight=(8,), bias=(8,))
    y, x, other = group_norm(**tensors, groups=2)
    assert torch.equal(x, tensors["x"]) and torch.equal(other, tensors["other"])
    leaves, dys = [tensors["x"], tensors["other"]], output_gradients((y, x, other), y.dtype)
    plain = torch.autograd.grad(y, leaves, dys[0], retain_graph=True)
    both = torch.autograd.grad((y, x, other), leaves, dys, retain_graph=True)
    for g, p, d in zip(both, plain, dys[1:], strict=True):
        assert error(g, p.double() + d.double()) < 1e-6
    without_y = torch.autograd.grad((x, other), leaves, dys[1:])
    assert all(torch.equal(g, d) for g, d in zip(without_y, dys[1:], strict=True))


def test_errors():
    x, w = torch.randn(2, 9, 66), torch.randn(66)
    with pytest.raises(ValueError, match="66 channels do not divide into 32 groups"):
        group_norm(x, w, w, 32)
    with pytest.raises(ValueError, match=r"strides \(66, 594, 1\), should be contiguous"):
        group_norm_forward([x.transpose(0, 1)], [torch.empty(9, 1, 2, 66)], w, w, 11, 1e-5)
    with pytest.raises(ValueError, match=r"should be \(2, 9, 66\)"):
        group_norm_forward([x, x[:, :8]], [torch.empty(2, 1, 2, 66)] * 2, w, w, 11, 1e-5)
    with pytest.raises(ValueError, match=r"shape \(0, 9, 66\) is empty"):
        group_norm(x[:0], w, w, 11)


def test_reference_is_pytorchs():
    tensors = widened(tensors_of("odd, seam in a group", "cpu", torch.float32))
    assert error(norm(6, True)(**tensors), eager.group_norm(6, True)(**tensors)) < 1e-12
