"""Both losses and both updates against an independent float64 evaluation of method.md, eqs. 2 to 8."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers_method import (
    BOUND,
    POISON,
    TinyUNet,
    assert_close,
    in_float64,
    micro_batches,
    naive_fake_score_loss,
    naive_fake_score_update,
    naive_generator_loss,
    naive_generator_update,
    naive_guided,
    naive_x_hat,
    objective_of,
    random_batch,
    setting,
)

from sidfast.method.distill import fake_score_update, generate, generator_update
from sidfast.method.guidance import drop_prompts, drops_prompts
from sidfast.method.losses import fake_score_loss, generator_loss

PREDICTION_TYPES = ("epsilon", "v_prediction")
KAPPAS = {
    "none": (1, 1, 1, 1),
    "teacher": (1, 1, 1, 4.5),
    "long-short": (1.5, 1.5, 1.5, 1.5),
    "zero": (0, 0, 0, 1),
    "anti": (-1, -1, -1, 1),
    "unequal": (2.0, 0.5, -0.25, 3.0),
    "unequal-0-1": (0.5, 0, 1, 0),
}                                                        # kappa1 .. kappa4
ALPHAS = (1.0, 0.5, 1.2)
SHAPE = (4, 5, 3)

for_prediction_types = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
for_kappas = pytest.mark.parametrize("kappas", KAPPAS.values(), ids=KAPPAS)
for_alphas = pytest.mark.parametrize("alpha", ALPHAS, ids="alpha={}".format)


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
    got, finite = generator_loss(*x, a.float(), s.float(), prediction_type, kappas[1:], alpha)
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
    got, finite = fake_score_loss(output, values["x_g"], values["eps"], a.float(), s.float(), prediction_type, kappa1)
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
    loss, _ = generator_loss(*x, a, s, "v_prediction", (1, 1, 1), 1.0)

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
    names, args = ("x_g", "x_t", "o_real", "o_fake"), (a.float(), s.float(), prediction_type, kappas[1:], 0.5)
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
        loss, finite = fake_score_loss(output, values["x_g"], values["eps"], a.float(), s.float(), prediction_type, 1.5)
        return loss, finite, torch.autograd.grad(loss, output, dloss)[0].reshape(2, 3, *SHAPE)

    want, _, want_grad = value_and_grad()
    name, _, half = where.partition("-")
    values[name][1 + 3 * (half == "cond"), 0, 4, 2] = torch.nan
    loss, finite, grad = value_and_grad()

    assert finite.tolist() == [True, False, True]
    assert loss[1] == 0 and torch.equal(loss[[0, 2]], want[[0, 2]])
    assert torch.equal(grad[:, [0, 2]], want_grad[:, [0, 2]]) and not grad[:, 1].any()


# Whole updates


def check_update(engine, sums, want_loss, want_grads, bound=BOUND):
    assert_close("loss", sums.loss, want_loss, bound)
    grads = engine.gradients()
    assert grads.keys() == want_grads.keys()
    scale = max(g.norm() for g in want_grads.values())
    for name, want in want_grads.items():
        if want.norm() > 1e-6 * scale:                   # (a parameter may have none, as the weight of an unread input)
            assert_close(f"d {name}", grads[name], want, bound)
        else:
            assert grads[name].norm() <= bound * scale, f"d {name}: {grads[name].norm():.1e} for zero"


def has_gradients(module):
    return [name for name, p in module.named_parameters() if p.grad is not None]


@for_prediction_types
@for_alphas
@for_kappas
def test_generator_update(kappas, alpha, prediction_type):
    objective = objective_of(*kappas, alpha, prediction_type)
    networks, batch, networks64, batch64 = setting()
    sums = generator_update(networks, objective)([batch])
    check_update(networks.generator, sums, *naive_generator_update(networks64, batch64, objective))

    assert sums.non_finite == 0
    assert (networks.generator.backwards, networks.generator.steps) == (1, 1)
    assert (networks.fake_score.backwards, networks.fake_score.steps) == (0, 0)
    assert not has_gradients(networks.fake_score.module) and not has_gradients(networks.teacher)
    assert all(p.requires_grad for p in networks.fake_score.module.parameters())          # ready for its own update


@for_prediction_types
@for_kappas
def test_fake_score_update(kappas, prediction_type):
    """The batch has one dropped prompt, and text at kappa1 = 1 sees it too."""
    objective = objective_of(*kappas, prediction_type=prediction_type)
    networks, batch, networks64, batch64 = setting()
    assert batch.dropped.tolist() == [False, True, False, False, False]
    sums = fake_score_update(networks, objective)([batch])
    check_update(networks.fake_score, sums, *naive_fake_score_update(networks64, batch64, objective))

    assert sums.non_finite == 0
    assert (networks.fake_score.backwards, networks.fake_score.steps) == (1, 1)
    assert (networks.generator.backwards, networks.generator.steps, networks.generator.passes) == (0, 0, 0)
    assert not has_gradients(networks.generator.module) and not has_gradients(networks.teacher)


def small_unet(seed, _):
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(8,), layers_per_block=1, cross_attention_dim=8, attention_head_dim=4, norm_num_groups=4)


@for_prediction_types
def test_updates_of_real_unets(prediction_type):
    objective = objective_of(*KAPPAS["unequal"], 1.2, prediction_type)
    options = {"make": small_unet, "n": 2, "shape": (4, 4, 4), "text_width": 8}
    networks, batch, networks64, batch64 = setting(**options)
    sums = generator_update(networks, objective)([batch])
    check_update(networks.generator, sums, *naive_generator_update(networks64, batch64, objective))
    assert not has_gradients(networks.fake_score.module) and not has_gradients(networks.teacher)

    networks, *_ = setting(**options)
    sums = fake_score_update(networks, objective)([batch])
    check_update(networks.fake_score, sums, *naive_fake_score_update(networks64, batch64, objective))


@pytest.mark.parametrize("t_init", (1, 400, 999))
def test_generator_starts_at_t_init(t_init):
    objective = objective_of(1, 1, 1, 1.5, t_init=t_init)
    networks, batch, networks64, batch64 = setting()
    sums = generator_update(networks, objective)([batch])
    check_update(networks.generator, sums, *naive_generator_update(networks64, batch64, objective))


def test_updates_leave_earlier_gradients_of_others_alone():
    objective = objective_of(1.5, 1.5, 1.5, 1.5)
    networks, batch, *_ = setting()
    fake_score_update(networks, objective)([batch])
    before = networks.fake_score.gradients()
    generator_update(networks, objective)([batch])
    after = networks.fake_score.gradients()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("update, engine", [(generator_update, "generator"), (fake_score_update, "fake_score")],
                         ids=["generator", "fake_score"])
@pytest.mark.parametrize("size", (1, 2, 3))
def test_accumulation_equals_one_batch(update, engine, size):
    objective = objective_of(*KAPPAS["unequal"], 0.5)
    whole, batch, *_ = setting(n=6)
    want = update(whole, objective)([batch])
    parts, batch, *_ = setting(n=6, accumulation=6 // size)
    got = update(parts, objective)(micro_batches(batch, size))

    assert getattr(parts, engine).backwards == getattr(parts, engine).steps == 6 // size
    check_update(getattr(parts, engine), got, want.loss, getattr(whole, engine).gradients(), bound=2e-6)


def poison(batch, *samples):
    """The batch with these samples' text such that a poisoned network overflows in them."""
    for sample in samples:
        batch.text[sample, :, POISON] = 3e38
    return batch


@pytest.mark.parametrize("kappa", (1, 1.5), ids="kappa={}".format)
@pytest.mark.parametrize("poisoned", ("teacher", "fake_score", "generator"))
def test_generator_update_without_non_finite_samples(poisoned, kappa):
    """Samples 1 and 4 overflow inside a network: they are counted, and the update is that of the other three."""
    objective = objective_of(kappa, kappa, kappa, kappa, alpha=0.5)
    networks, batch, networks64, batch64 = setting(poisoned=(poisoned,))
    want = naive_generator_update(networks64, batch64, objective, skip=(1, 4))
    sums = generator_update(networks, objective)([poison(batch, 1, 4)])
    assert sums.non_finite == 2
    check_update(networks.generator, sums, *want)


@pytest.mark.parametrize("kappa", (1, 1.5), ids="kappa={}".format)
@pytest.mark.parametrize("poisoned", ("generator", "fake_score"))
def test_fake_score_update_without_non_finite_samples(poisoned, kappa):
    objective = objective_of(kappa, kappa, kappa, kappa)
    networks, batch, networks64, batch64 = setting(poisoned=(poisoned,))
    batch.dropped[:] = batch64.dropped[:] = False
    want = naive_fake_score_update(networks64, batch64, objective, skip=(1, 4))
    sums = fake_score_update(networks, objective)([poison(batch, 1, 4)])
    assert sums.non_finite == 2
    check_update(networks.fake_score, sums, *want)


def test_non_finite_samples_are_counted_over_micro_batches():
    networks, batch, *_ = setting(n=6, poisoned=("teacher",), accumulation=3)
    sums = generator_update(networks, objective_of(1, 1, 1, 1.5))(micro_batches(poison(batch, 0, 1, 5), 2))
    assert sums.non_finite == 3 and sums.loss.isfinite()
    assert all(g.isfinite().all() for g in networks.generator.gradients().values())


# Prompt dropout (section 2)


def test_drop_prompts():
    batch = random_batch(4)
    text = drop_prompts(batch.text, batch.null, torch.tensor([True, False, False, True]))
    assert torch.equal(text[[1, 2]], batch.text[[1, 2]])
    assert torch.equal(text[0], batch.null[0]) and torch.equal(text[3], batch.null[0])


@pytest.mark.parametrize("kappas, drops", [
    ((1, 1, 1), False), ((1.5, 1.5, 1.5), True), ((0, 1, 1), True), ((1, 2, 1), True), ((1, 1, -1), True)], ids=str)
def test_prompts_drop_where_the_null_branch_is_used(kappas, drops):
    assert drops_prompts(*kappas) is drops


def test_dropped_prompts_change_what_the_fake_score_reads_only():
    """The images are made from the real prompts, so that the null branch learns all of the generator's images."""
    objective = objective_of()
    networks, batch, *_ = setting()
    seen = []
    networks.generator.module.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True)
    networks.fake_score.module.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True)
    fake_score_update(networks, objective)([batch])
    generator_text, fake_text = seen
    assert torch.equal(generator_text, batch.text)
    assert torch.equal(fake_text[1], batch.null[0]) and torch.equal(fake_text[[0, 2, 3, 4]], batch.text[[0, 2, 3, 4]])


def test_naive_evaluation_sees_every_part():
    """A guard on the reference itself: text, timestep, eps and every parameter matter to it."""
    objective = objective_of(*KAPPAS["unequal"], 0.5)
    _, batch, networks64, _ = setting()
    base, grads = naive_generator_update(networks64, in_float64(batch), objective)
    assert all(g.any() for g in grads.values())
    for field in ("text", "null", "z", "eps", "t"):
        changed = in_float64(batch._replace(**{field: getattr(batch, field) * 0.9}))
        assert (naive_generator_update(networks64, changed, objective)[0] - base).abs() > 1e-3 * base.abs(), field
    assert TinyUNet(0).state_dict().keys() == grads.keys()
    z, text = batch.z, batch.text
    assert generate(TinyUNet(0), z, text, objective).shape == z.shape
