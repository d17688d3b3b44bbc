"""Graphed updates, on the CPU: what stands around the two graphs, with passes run anew in the place of replays."""

import pytest
import torch
from helpers_method import micro_batches, objective_of, setting
from test_losses import poison

from sidfast.errors import NothingFinite
from sidfast.method.distill import fake_score_update, generator_update
from sidfast.networks.graphs import GradientSums, GraphedLoss

UPDATES = {"generator": generator_update, "fake_score": fake_score_update}
OBJECTIVE = objective_of(1.5, 2, 0.5, 1.5, alpha=0.5)


def replayed(log):
    """A stand-in for `capture_graph`: a replay calls the function and writes into the tensors of the first call."""

    def capture(function, pool):
        results = function()
        static = [None if v is None else v.detach().clone() for v in results or ()]

        def replay():
            log.append(function.__name__)
            for old, new in zip(static, function() or (), strict=True):
                if old is not None:
                    old.copy_(new.detach())

        return replay, static

    return capture


def graphed(log):
    return {"graph": lambda compute, leave_out: GraphedLoss(compute, leave_out, capture=replayed(log))}


def run(engine, log=None, **options):
    """(Sums and the gradients so far after two updates of three micro-batches each); with a log, graphed."""
    networks, batch, *_ = setting(n=6, accumulation=3 if log is None else 1, **options)
    step = UPDATES[engine](networks, OBJECTIVE, **({} if log is None else graphed(log)))
    poison(batch, *([3, 4, 5] if options else []))
    results = []
    for _ in range(2):
        sums = step(micro_batches(batch, 2))
        results.append((sums, getattr(networks, engine).gradients()))
        assert getattr(networks, engine).backwards == len(results) * (3 if log is None else 1)
    return results


PASSES = ["forward", "backward"]


@pytest.mark.parametrize("engine, poisoned", [
    ("generator", None), ("generator", "generator"), ("generator", "fake_score"), ("generator", "teacher"),
    ("fake_score", None), ("fake_score", "generator"), ("fake_score", "fake_score")])
def test_graphed_update_is_the_written_one(engine, poisoned):
    """Poisoned: one sample of a micro-batch overflows inside a network, and both of another one."""
    options = {"poisoned": (poisoned,)} if poisoned else {}
    log = []
    for (want, want_gradients), (got, gradients) in zip(
            run(engine, **options), run(engine, log, **options), strict=True):
        for name in ("loss", "non_finite", "losses", "t"):
            torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-6, atol=0, msg=name)
        torch.testing.assert_close(gradients, want_gradients, rtol=1e-5, atol=1e-7)
    assert want.non_finite == (3 if poisoned else 0)
    again = PASSES if poisoned else []                   # of the second micro-batch and the third
    assert log == [*PASSES, "begin", *PASSES, *again, "add", *PASSES, *again, "add"] * 2


def test_the_backward_pass_does_not_wait_for_the_host(monkeypatch):
    log, all_finite = [], GraphedLoss._all_finite

    def asked(graphed):
        log.append("asked")
        return all_finite(graphed)

    monkeypatch.setattr(GraphedLoss, "_all_finite", asked)
    run("generator", log)
    assert log == [*PASSES, "asked", "begin", *[*PASSES, "asked", "add"] * 2] * 2


@pytest.mark.parametrize("kind, bound", [(torch.bfloat16, 0.0), (torch.float32, 0.0)], ids=str)
def test_sums_are_in_fp32(kind, bound):
    """256 gradients of 1 / 256 and one of 1: in bf16 the sum would stop growing at once."""
    unet = torch.nn.Linear(1, 1, bias=False).to(kind)

    def compute(unet, x):
        y = (unet.weight * x).sum()
        return y.float(), x.isfinite(), y.detach()

    loss = GraphedLoss(compute, None, capture=replayed([]))
    for k, value in enumerate([1.0] + [1 / 256] * 256):
        loss(unet, 1.0, k == 0, torch.full((1,), value, dtype=kind))
    loss.hand_over(unet).backward()
    assert unet.weight.grad.dtype == kind and abs(unet.weight.grad.item() - 2) <= bound


def test_weights_and_unused_parameters():
    """A loss counts as often as its weight says; a parameter that no loss depends on has no gradient."""
    unet = torch.nn.Linear(1, 1)
    loss = GraphedLoss(lambda unet, x: ((unet.weight * x).sum(), x.isfinite(), x), None, capture=replayed([]))
    for k, weight in enumerate((0.5, 4.0)):
        loss(unet, weight, k == 0, torch.tensor([3.0 + k]))
    loss.hand_over(unet).backward()
    assert unet.weight.grad == 0.5 * 3 + 4 * 4 and unet.bias.grad is None


def test_a_network_that_is_finite_for_nothing():
    networks, batch, *_ = setting(n=2)
    with torch.no_grad():
        networks.generator.module.unet.conv_out.bias.fill_(torch.nan)
    step = generator_update(networks, OBJECTIVE, **graphed([]))
    with pytest.raises(NothingFinite, match="not finite for any input"):
        step([batch])


def test_other_shapes_are_refused():
    networks, batch, *_ = setting(n=4)
    step = generator_update(networks, OBJECTIVE, **graphed([]))
    step([batch])
    with pytest.raises(ValueError, match=r"captured for a tensor of shape \(4,.*got \(2,"):
        step(micro_batches(batch, 2))


def test_all_are_warmed_up_before_the_first_capture():
    """One update after the other, as a trainer does, with one set of sums; what they come to is the same."""
    results = []
    for early in (False, True):
        log, seen, sums = [], [], GradientSums()
        networks, batch, *_ = setting(n=2)
        updates = [make(networks, OBJECTIVE, graph=lambda compute, leave_out, log=log, sums=sums: GraphedLoss(
            compute, leave_out, sums=sums, capture=replayed(log))) for make in UPDATES.values()]
        networks.teacher.register_forward_pre_hook(lambda *_, log=log, seen=seen: seen.append(list(log)))
        if early:
            for update in updates:
                update.warm_up(batch)
        assert bool(seen) is early and log == []
        losses = [update([batch]).loss for update in updates]
        assert log == [*PASSES, "begin"] * 2
        assert updates[0].graphed._summed is updates[1].graphed._summed
        results.append([*losses, *networks.generator.gradients().values()])
    torch.testing.assert_close(*results, rtol=0, atol=0)
