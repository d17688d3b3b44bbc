"""Noising and the two losses as kernels, against their references in float64."""

import pytest
import torch
from helpers_kernels import BOUND, DEVICES
from helpers_latents import assert_close, assert_no_worse, draw, value_and_grads
from hypothesis import given, settings
from hypothesis import strategies as st
from sidfast.kernels.fake_score_loss import fake_score_loss, fake_score_loss_reference
from sidfast.kernels.guidance import denoise
from sidfast.kernels.noising import add_noise, add_noise_reference
from sidfast.kernels.sid_loss import sid_loss, sid_loss_reference

SHAPES = [(1, 1, 1, 1), (3, 4, 5, 3), (2, 4, 32, 32), (2, 3, 41, 33)]        # one program a sample, and several
KAPPAS = {"none": (1, 1, 1), "lsg": (1.5, 1.5, 1.5), "unequal": (1.5, 0.5, 3), "zero": (0, 0, 1), "anti": (-1, -1, 1)}


def sid_inputs(shape, real, fake, device, dtype=torch.float64, seed=0):
    N, *rest = shape
    x_g, x_t, o_real, o_fake = (draw((k * N, *rest), seed + i) for i, k in enumerate((1, 1, real, fake)))
    A, B = 1 + draw((N,), seed + 4).abs(), -draw((N,), seed + 5).abs()
    dloss = draw((N,), seed + 6)
    return [v.to(dtype).double() for v in (x_g, x_t, o_real, o_fake)], (A, B), dloss


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kappas", KAPPAS.values(), ids=KAPPAS)
@pytest.mark.parametrize("alpha", (1, 0.5, 1.2), ids="alpha={}".format)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sid_loss(shape, alpha, kappas, device):
    real, fake = 1 + (kappas[2] != 1), 1 + (kappas[0] not in (0, 1))
    x, levels, dloss = sid_inputs(shape, real, fake, device)
    want = value_and_grads(lambda *x: sid_loss_reference(*x, *levels, *kappas, alpha)[0], x, dloss)
    x32 = [v.float().to(device) for v in x]
    levels = [v.float().to(device) for v in levels]
    got = value_and_grads(lambda *x: sid_loss(*x, *levels, *kappas, alpha)[0], x32, dloss.float().to(device))
    for name, g, w in zip(("loss", "dx_g", "dx_t", "do_real", "do_fake"), got, want, strict=True):
        if w.any():                                      # (alpha = 1 and equal images leave nothing of some)
            assert_close(name, g, w, BOUND)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_sid_loss_in_low_precision(dtype, device):
    """The images in fp32, the networks' outputs in low precision: no worse than PyTorch on the same outputs."""
    x, levels, dloss = sid_inputs((3, 4, 17, 9), 2, 2, device, dtype)
    levels32 = [v.float().to(device) for v in levels]
    types = (torch.float32, torch.float32, dtype, dtype)
    cast = [v.to(t).to(device) for v, t in zip(x, types, strict=True)]
    args = (1.5, 0.5, 2, 0.5)
    want = value_and_grads(lambda *x: sid_loss_reference(*x, *levels, *args)[0], x, dloss)
    got = value_and_grads(lambda *x: sid_loss(*x, *levels32, *args)[0], cast, dloss.float().to(device))
    plain = value_and_grads(lambda *x: sid_loss_reference(*x, *levels32, *args)[0], cast, dloss.float().to(device))
    assert [g.dtype for g in got[1:]] == list(types)
    for name, g, p, w in zip(("loss", "dx_g", "dx_t", "do_real", "do_fake"), got, plain, want, strict=True):
        assert_no_worse(name, g, p, w)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", (torch.nan, torch.inf, -torch.inf), ids=str)
@pytest.mark.parametrize("where", range(4), ids=("x_g", "x_t", "o_real", "o_fake"))
def test_sid_loss_leaves_out_non_finite_samples(where, bad, device):
    x, levels, dloss = sid_inputs((3, 4, 33, 33), 2, 2, device)
    x, levels, dloss = ([v.float().to(device) for v in group] for group in (x, levels, [dloss]))
    args = (*levels, 1.5, 1.5, 1.5, 0.5)
    want = value_and_grads(lambda *x: sid_loss(*x, *args)[0], x, dloss[0])
    x[where][1, 2, 30, 1] = bad
    got = value_and_grads(lambda *x: sid_loss(*x, *args)[0], x, dloss[0])
    assert sid_loss(*x, *args)[1].tolist() == [True, False, True]
    for name, g, w in zip(("loss", "dx_g", "dx_t", "do_real", "do_fake"), got, want, strict=True):
        g, w = (v.reshape(-1, 3, *v.shape[1:]) for v in (g, w))
        assert torch.equal(g[:, [0, 2]], w[:, [0, 2]]), f"{name} of the other samples changed"
        assert not g[:, 1].any(), f"{name} of the bad sample is not zero"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kappa1", (1, 0, 1.5, -1))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fake_score_loss(shape, kappa1, device):
    N, *rest = shape
    output, target = draw(((1 + (kappa1 not in (0, 1))) * N, *rest), 0), draw(shape, 1)
    w, dloss = draw((N,), 2).abs(), draw((N,), 3)
    want = value_and_grads(lambda o: fake_score_loss_reference(o, target, w, kappa1)[0], [output], dloss)
    on = [v.float().to(device) for v in (output, target, w, dloss)]
    got = value_and_grads(lambda o: fake_score_loss(o, on[1], on[2], kappa1)[0], on[:1], on[3])
    for name, g, r in zip(("loss", "doutput"), got, want, strict=True):
        assert_close(name, g, r, BOUND)


@pytest.mark.parametrize("device", DEVICES)
def test_fake_score_loss_leaves_out_non_finite_samples(device):
    output, target, w = (draw(s, i).float().to(device) for i, s in enumerate(((6, 4, 33, 33), (3, 4, 33, 33), (3,))))
    want = value_and_grads(lambda o: fake_score_loss(o, target, w, 1.5)[0], [output], w)
    output[4, 0, 32, 32] = torch.inf
    got = value_and_grads(lambda o: fake_score_loss(o, target, w, 1.5)[0], [output], w)
    assert fake_score_loss(output, target, w, 1.5)[1].tolist() == [True, False, True]
    for g, r in zip(got, want, strict=True):
        g, r = (v.reshape(-1, 3, *v.shape[1:]) for v in (g, r))
        assert torch.equal(g[:, [0, 2]], r[:, [0, 2]]) and not g[:, 1].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("copies", (1, 2))
@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last), ids=str)
def test_add_noise(layout, copies, dtype, device):
    x, eps = (draw((3, 4, 41, 33), i).contiguous(memory_format=layout) for i in range(2))
    a, s = draw((3,), 2).abs(), draw((3,), 3).abs()
    dx_t, dinput = draw(x.shape, 4), draw((copies * 3, *x.shape[1:]), 5).to(dtype)

    def both(f, x, eps, a, s, dx_t, dinput, dtype):
        x = x.detach().requires_grad_()
        x_t, network_input = f(x, eps, a, s, copies, dtype)
        return x_t, network_input, *torch.autograd.grad((x_t, network_input), x, (dx_t, dinput))

    want = both(add_noise_reference, x, eps, a, s, dx_t, dinput.double(), torch.float64)
    on = [v.float().to(device) for v in (x, eps, a, s, dx_t)]
    got = both(add_noise, *on, dinput.to(device), dtype)
    assert got[1].dtype == dtype and got[1].is_contiguous(memory_format=layout)
    for name, g, w, bound in zip(("x_t", "input", "dx"), got, want, (BOUND, torch.finfo(dtype).eps + BOUND, BOUND),
                                 strict=True):
        assert_close(name, g, w, bound)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(n=st.integers(1, 4), c=st.integers(1, 5), h=st.integers(1, 40), w=st.integers(1, 40),
       real=st.sampled_from((1, 2)), fake=st.sampled_from((1, 2)), channels_last=st.booleans(), seed=st.integers(0, 99))
def test_sid_loss_of_any_shape(n, c, h, w, real, fake, channels_last, seed):
    x, levels, dloss = sid_inputs((n, c, h, w), real, fake, "cpu", seed=seed)
    want = value_and_grads(lambda *x: sid_loss_reference(*x, *levels, 2, 0.5, 1.5, 0.7)[0], x, dloss)
    if channels_last:                                    # of some of the inputs only
        x = [v.contiguous(memory_format=torch.channels_last) if i % 2 else v for i, v in enumerate(x)]
    levels = [v.float() for v in levels]
    got = value_and_grads(lambda *x: sid_loss(*x, *levels, 2, 0.5, 1.5, 0.7)[0], [v.float() for v in x], dloss.float())
    for name, g, r in zip(("loss", "dx_g", "dx_t", "do_real", "do_fake"), got, want, strict=True):
        assert_close(name, g, r, 1e-4 if n * c * h * w < 8 else 2e-5)        # (few numbers can cancel)


@pytest.mark.parametrize("device", DEVICES)
def test_samples_of_many_programs(device):
    """Of 36, whose parts the last one to finish adds up 32 at a time; a bad element lies in the last part."""
    x, (A, B), dloss = sid_inputs((2, 4, 128, 140), 2, 2, device)
    args = (1.5, 0.5, 2, 0.5)
    want = value_and_grads(lambda *x: sid_loss_reference(*x, A, B, *args)[0], x, dloss)
    fake_want = value_and_grads(lambda o: fake_score_loss_reference(o, x[0], -B, 1.5)[0], [x[2]], dloss)
    x, (A, B, dloss) = ([v.float().to(device) for v in group] for group in (x, (A, B, dloss)))
    got = value_and_grads(lambda *x: sid_loss(*x, A, B, *args)[0], x, dloss)
    fake_got = value_and_grads(lambda o: fake_score_loss(o, x[0], -B, 1.5)[0], [x[2]], dloss)
    for name, g, w in zip(("loss", "dx_g", "dx_t", "do_real", "do_fake", "fake loss", "doutput"), (*got, *fake_got),
                          (*want, *fake_want), strict=True):
        assert_close(name, g, w, BOUND)
    x[2][1, 3, 127, 139] = torch.nan
    assert sid_loss(*x, A, B, *args)[1].tolist() == [True, False]
    assert fake_score_loss(x[2], x[0], A, 1.5)[1].tolist() == [True, False]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kappas", [(1e30, 1, 1), (1, 1e30, 1), (1, 1, 1e30)], ids=("y_2", "y_3", "y_real"))
def test_sid_loss_of_an_estimate_that_overflows(kappas, device):
    """Outputs are finite, and what guidance makes of one of them is not."""
    x, levels, _ = sid_inputs((2, 4, 3, 3), 2, 2, device)
    x, levels = ([v.float().to(device) for v in group] for group in (x, levels))
    for output in x[2:]:
        output[[1, 3]] *= torch.tensor([-1e10, 1e10], device=device).view(2, 1, 1, 1)        # of the second sample
        output[0] = output[2]                       # (nothing is left of guidance in the first)
    loss, finite = sid_loss(*x, *levels, *kappas, 0.5)
    assert finite.tolist() == [True, False] and loss[0].isfinite() and loss[1] == 0
    assert sid_loss_reference(*x, *levels, *kappas, 0.5)[1].tolist() == [True, False]


def test_shapes_that_do_not_fit():
    x, a = torch.zeros(2, 4, 3, 3), torch.zeros(2)
    with pytest.raises(ValueError, match="o_fake has 3 rows, neither 2 nor 4"):
        sid_loss(x, x, x, torch.zeros(3, 4, 3, 3), a, a, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="3 rows are neither 2 nor 4"):
        fake_score_loss(torch.zeros(3, 4, 3, 3), x, a, 1)
    small, few = x[..., :2], a[:1]
    for inputs in ((x[:1], x, x, a, a), (x, small, x, a, a), (x, x, small, a, a), (x, x, x, few, a), (x, x, x, a, few)):
        with pytest.raises(ValueError, match=r"sid_loss: a tensor of shape \(.*\) should be \(2,"):
            sid_loss(x, *inputs, 1, 1, 1, 1)
    for inputs in ((small, x, a), (x, x, few)):
        with pytest.raises(ValueError, match=r"fake_score_loss: a tensor of shape \(.*\) should be \(2,"):
            fake_score_loss(*inputs, 1)
    for inputs in ((small, a, a), (x, few, a), (x, a, few)):
        with pytest.raises(ValueError, match=r"add_noise: a tensor of shape \(.*\) should be \(2,"):
            add_noise(x, *inputs, 1, torch.float32)
    with pytest.raises(ValueError, match="is empty"):
        sid_loss(*(x[:0],) * 4, a[:0], a[:0], 1, 1, 1, 1)


def test_the_memory_format_is_that_of_the_networks():
    """Outputs of the fused UNet are channels last: so are the images made of them, and no loss copies an output."""
    o = torch.randn(2, 4, 5, 3).contiguous(memory_format=torch.channels_last)
    x_t, a = torch.randn(2, 4, 5, 3), torch.rand(2)
    x_g = denoise(o, x_t, a, a, 1)
    x_t, x_in = add_noise(x_g, x_t, a, a, 2, torch.bfloat16)
    target = torch.randn(2, 4, 5, 3)
    o = o.requires_grad_()
    [do] = torch.autograd.grad(fake_score_loss(o, target, a, 1)[0].sum(), o)
    for v in (x_g, x_t, x_in, do):
        assert v.is_contiguous(memory_format=torch.channels_last) and not v.is_contiguous()


def test_operators_are_registered():
    """Fake implementations, autograd and schemas agree, so torch.compile and CUDA graphs take the operators."""
    x, levels, _ = sid_inputs((2, 4, 5, 3), 2, 2, "cpu")
    x, levels = [v.float().requires_grad_() for v in x], [v.float() for v in levels]
    torch.library.opcheck(torch.ops.sidfast.sid_loss.default, (*x, *levels, 1.5, 1.5, 1.5, 0.5))
    torch.library.opcheck(torch.ops.sidfast.fake_score_loss.default, (x[2], x[0].detach(), levels[0], 1.5))
    last = x[2].detach().contiguous(memory_format=torch.channels_last).requires_grad_()      # (x's format or another's)
    torch.library.opcheck(torch.ops.sidfast.fake_score_loss.default, (last, x[0].detach(), levels[0], 1.5))
    torch.library.opcheck(torch.ops.sidfast.add_noise.default, (*x[:2], *levels, 2, torch.bfloat16))

    def loss(*x):
        return sid_loss(*x, *levels, 1.5, 1.5, 1.5, 0.5)[0].sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for got, want in zip(torch.autograd.grad(compiled(*x), x), torch.autograd.grad(loss(*x), x), strict=True):
        assert torch.equal(got, want)
