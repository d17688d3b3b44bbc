"""Whole updates of both networks against an independent float64 evaluation of method.md, eqs. 1 to 8."""

import pytest
import torch
from helpers_method import (
    BOUND,
    KAPPAS,
    TEXT,
    TinyUNet,
    assert_close,
    for_alphas,
    for_kappas,
    for_prediction_types,
    in_float64,
    micro_batches,
    naive_fake_score_update,
    naive_generator_update,
    objective_of,
    poison,
    random_batch,
    setting,
    small_unet,
)

from sidfast.engines.update import fake_score_update, generator_update
from sidfast.method.equations import drop_prompts, drops_prompts
from sidfast.method.generator import generate


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
    text = drop_prompts(batch.cond, batch.uncond, torch.tensor([True, False, False, True]))[TEXT]
    assert torch.equal(text[[1, 2]], batch.cond[TEXT][[1, 2]])
    assert torch.equal(text[0], batch.uncond[TEXT][0]) and torch.equal(text[3], batch.uncond[TEXT][0])


@pytest.mark.parametrize("kappas, drops", [
    ((1, 1, 1), False), ((1.5, 1.5, 1.5), True), ((0, 1, 1), True), ((1, 2, 1), True), ((1, 1, -1), True)], ids=str)
def test_prompts_drop_where_the_null_branch_is_used(kappas, drops):
    assert drops_prompts(*kappas) is drops


def test_dropped_prompts_change_what_the_fake_score_reads_only():
    """The images are made from the real prompts, so that the null branch learns all of the generator's images."""
    objective = objective_of()
    networks, batch, *_ = setting()
    seen = []
    networks.generator.module.network.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True)
    networks.fake_score.module.network.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True)
    fake_score_update(networks, objective)([batch])
    generator_text, fake_text = seen
    assert torch.equal(generator_text, batch.cond[TEXT])
    others = [0, 2, 3, 4]
    assert torch.equal(fake_text[1], batch.uncond[TEXT][0])
    assert torch.equal(fake_text[others], batch.cond[TEXT][others])


def test_naive_evaluation_sees_every_part():
    """A guard on the reference itself: text, timestep, eps and every parameter matter to it."""
    objective = objective_of(*KAPPAS["unequal"], 0.5)
    _, batch, networks64, _ = setting()
    base, grads = naive_generator_update(networks64, in_float64(batch), objective)
    assert all(g.any() for g in grads.values())
    for field in ("cond", "uncond", "z", "eps", "t"):
        value = getattr(batch, field)
        smaller = {TEXT: value[TEXT] * 0.9} if isinstance(value, dict) else value * 0.9
        changed = in_float64(batch._replace(**{field: smaller}))
        assert (naive_generator_update(networks64, changed, objective)[0] - base).abs() > 1e-3 * base.abs(), field
    assert TinyUNet(0).state_dict().keys() == grads.keys()
    assert generate(TinyUNet(0), batch.z, batch.cond, objective).shape == batch.z.shape
