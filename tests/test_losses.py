"""Both losses against an independent float64 evaluation of method.md, eqs. 2 to 8."""

import pytest
import torch
from helpers_method import (
    ALPHAS_CUMPROD,
    KAPPAS,
    assert_close,
    for_alphas,
    for_kappas,
    for_prediction_types,
    naive_fake_score_loss,
    naive_generator_loss,
    naive_guided,
    naive_x_hat,
)

from sidfast.method.equations import fake_score_loss, generator_loss
from sidfast.teachers.paths import DiscreteBetas

SHAPE = (4, 5, 3)


def schedule_of(prediction_type):
    return DiscreteBetas(ALPHAS_CUMPROD, prediction_type)


def halves(output, n, kappas):
    """(o_null, o_cond) [n, C, H, W] of an output that was made for `kappas`; one that is not needed is NaN."""
    if all(k == 1 for k in kappas):
        return torch.full_like(output, torch.nan), output
    if all(k == 0 for k in kappas):
        return output, torch.full_like(output, torch.nan)
    return output[:n], output[n:]


def guided(o_null, o_cond, kappa):
    return o_cond if kappa == 1 else o_null if kappa == 0 else naive_guided(o_null, o_cond, kappa)


def loss_inputs(kappas, n=3, seed=0):
    """x_g, eps, outputs with as many rows as the scales need (one dictionary), t, and upstream gradients."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    def rows(scales):
        return n if all(k == 1 for k in scales) or all(k == 0 for k in scales) else 2 * n

    values = {"x_g": normal(n, *SHAPE), "x_t": normal(n, *SHAPE), "eps": normal(n, *SHAPE),
              "o_real": normal(rows(kappas[3:]), *SHAPE), "o_fake": normal(rows(kappas[1:3]), *SHAPE),
              "output": normal(rows(kappas[:1]), *SHAPE)}
    sigma = torch.tensor([0.15, 1.0, 6.0], dtype=torch.float64)[:n]
    a = (1 + sigma**2) ** -0.5
    return values, a, sigma * a, normal(n)


def tracked(values, *names, dtype):
    return [values[name].to(dtype, copy=True).requires_grad_() for name in names]


@for_prediction_types
@for_alphas
@for_kappas
def test_generator_loss(kappas, alpha, prediction_type):
    values, a, s, dloss = loss_inputs(kappas)
    names = ("x_g", "x_t", "o_real", "o_fake")

    x = tracked(values, *names, dtype=torch.float32)
    got, finite = generator_loss(*x, a.float(), s.float(), schedule_of(prediction_type), kappas[1:], alpha)
    got_grads = torch.autograd.grad(got, x, dloss)

    x64 = x_g, x_t, o_real, o_fake = tracked(values, *names, dtype=torch.float64)
    real, fake = halves(o_real, 3, kappas[3:]), halves(o_fake, 3, kappas[1:3])
    want = []
    for n in range(3):
        y_real, y_2, y_3 = (
            naive_x_hat(prediction_type, x_t[n], guided(o[0][n], o[1][n], kappa), a[n].item(), s[n].item())
            for o, kappa in ((real, kappas[3]), (fake, kappas[1]), (fake, kappas[2])))
        want.append(naive_generator_loss(x_g[n], y_real, y_2, y_3, alpha))
    want = torch.stack(want)

    assert got.shape == (3,) and finite.tolist() == [True] * 3
    assert_close("loss", got, want)
    for name, g, w in zip(names, got_grads, torch.autograd.grad(want, x64, dloss.double()), strict=True):
        assert_close(f"d{name}", g, w)


@for_prediction_types
@pytest.mark.parametrize("kappa1", (1, 1.5, 0, -1), ids="kappa1={}".format)
def test_fake_score_loss(kappa1, prediction_type):
    values, a, s, dloss = loss_inputs((kappa1, 1, 1, 1))

    [output] = tracked(values, "output", dtype=torch.float32)
    got, finite = fake_score_loss(output, values["x_g"], values["eps"], a.float(), s.float(),
                                  schedule_of(prediction_type), kappa1)
    [got_grad] = torch.autograd.grad(got, output, dloss)

    [output] = tracked(values, "output", dtype=torch.float64)
    o_null, o_cond = halves(output, 3, [kappa1])
    want = torch.stack([
        naive_fake_score_loss(prediction_type, guided(o_null[n], o_cond[n], kappa1), values["x_g"][n].double(),
                              values["eps"][n].double(), a[n].item(), s[n].item()) for n in range(3)])

    assert got.shape == (3,) and finite.tolist() == [True] * 3
    assert_close("loss", got, want)
    assert_close("doutput", got_grad, torch.autograd.grad(want, output, dloss.double())[0])


def test_sample_weight_is_capped():
    """Where the generator agrees with the teacher, omega is 1e5 and not infinite (eq. 7)."""
    values, a, s, dloss = loss_inputs((1, 1, 1, 1))
    a, s = a.float(), s.float()
    x_g, x_t = values["x_g"], values["x_t"]
    o_real = (a[:, None, None, None] * x_t - x_g) / s[:, None, None, None]               # y_real = x_g, to rounding
    x = [v.clone().requires_grad_() for v in (x_g, x_t, o_real, values["o_fake"])]
    loss, _ = generator_loss(*x, a, s, schedule_of("v_prediction"), (1, 1, 1), 1.0)

    gap = x_g.double() - (a[:, None, None, None] * x_t - s[:, None, None, None] * values["o_fake"]).double()
    want = -1e5 * gap.square().sum((1, 2, 3))            # (y_real - y_2)(y_3 - x_g) with y_real = x_g, y_2 = y_3
    assert_close("loss", loss, want)
    dx_g = torch.autograd.grad(loss, x, dloss)[0]
    assert_close("dx_g", dx_g, -1e5 * gap * dloss[:, None, None, None])


@for_prediction_types
@pytest.mark.parametrize("bad", ("nan", "inf", "-inf"))
@pytest.mark.parametrize("where", ("x_g", "o_real", "o_fake-null", "o_fake-cond"))
def test_generator_loss_without_non_finite_samples(where, bad, prediction_type):
    kappas = KAPPAS["unequal"]
    values, a, s, dloss = loss_inputs(kappas)
    names = ("x_g", "x_t", "o_real", "o_fake")
    args = (a.float(), s.float(), schedule_of(prediction_type), kappas[1:], 0.5)
    clean = tracked(values, *names, dtype=torch.float32)
    want, _ = generator_loss(*clean, *args)
    want_grads = torch.autograd.grad(want, clean, dloss)

    name, _, half = where.partition("-")
    values[name][1 + 3 * (half == "cond"), 2, 3, 1] = float(bad)
    x = tracked(values, *names, dtype=torch.float32)
    loss, finite = generator_loss(*x, *args)
    grads = torch.autograd.grad(loss, x, dloss)

    assert finite.tolist() == [True, False, True]
    assert loss[1] == 0 and torch.equal(loss[[0, 2]], want[[0, 2]])
    for name, g, w in zip(names, grads, want_grads, strict=True):
        g, w = (v.reshape(-1, 3, *SHAPE) for v in (g, w))                                # [halves, samples, ...]
        assert torch.equal(g[:, [0, 2]], w[:, [0, 2]]), f"d{name} of the other samples changed"
        assert not g[:, 1].any(), f"d{name} of the bad sample is not zero"


@pytest.mark.parametrize("where, prediction_type", [
    ("output-null", "epsilon"), ("output-cond", "epsilon"), ("eps", "epsilon"),
    ("output-null", "v_prediction"), ("output-cond", "v_prediction"), ("eps", "v_prediction"), ("x_g", "v_prediction"),
])                                                       # (the target of epsilon prediction does not hold x_g)
def test_fake_score_loss_without_non_finite_samples(where, prediction_type):
    values, a, s, dloss = loss_inputs((1.5, 1, 1, 1))

    def value_and_grad():
        [output] = tracked(values, "output", dtype=torch.float32)
        loss, finite = fake_score_loss(output, values["x_g"], values["eps"], a.float(), s.float(),
                                       schedule_of(prediction_type), 1.5)
        return loss, finite, torch.autograd.grad(loss, output, dloss)[0].reshape(2, 3, *SHAPE)

    want, _, want_grad = value_and_grad()
    name, _, half = where.partition("-")
    values[name][1 + 3 * (half == "cond"), 0, 4, 2] = torch.nan
    loss, finite, grad = value_and_grad()

    assert finite.tolist() == [True, False, True]
    assert loss[1] == 0 and torch.equal(loss[[0, 2]], want[[0, 2]])
    assert torch.equal(grad[:, [0, 2]], want_grad[:, [0, 2]]) and not grad[:, 1].any()
