"""Graphed updates, on the CPU: what stands around the two graphs, with passes run anew in the place of replays."""

import pytest
import torch
from helpers_method import micro_batches, objective_of, setting
from test_losses import poison

from sidfast.errors import NothingFinite
from sidfast.method.distill import fake_score_update, generator_update
from sidfast.networks.graphs import GraphedLoss

UPDATES = {"generator": generator_update, "fake_score": fake_score_update}
OBJECTIVE = objective_of(1.5, 2, 0.5, 1.5, alpha=0.5)


def replayed(log):
    """A stand-in for `capture_passes`: "replays" write what a pass gives now into the tensors of the first one."""

    def capture(forward, backward, pool):
        log.append("capture")
        results = [[None if v is None else v.detach().clone() for v in function()] for function in (forward, backward)]

        def replay(name, function, static):
            log.append(name)
            with torch.enable_grad():
                results = function()
            for old, new in zip(static, results, strict=True):
                if old is not None:
                    old.copy_(new.detach())

        return (lambda: replay("forward", forward, results[0]), lambda: replay("backward", backward, results[1]),
                *results)

    return capture


def run(engine, log=None, **options):
    """(Sums and the gradients so far after two updates of three micro-batches each); with a log, graphed."""
    networks, batch, *_ = setting(n=6, accumulation=3, **options)
    wrap = {} if log is None else {"wrap": lambda compute, leave_out: GraphedLoss(
        compute, leave_out, capture=replayed(log))}
    step = UPDATES[engine](networks, OBJECTIVE, **wrap)
    poison(batch, *([3, 4, 5] if options else []))
    results = []
    for _ in range(2):
        sums = step(micro_batches(batch, 2))
        results.append((sums, getattr(networks, engine).gradients()))
    return results


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
    again = 2 * 2 if poisoned else 0                     # two micro-batches of each update
    assert log == ["capture", *["forward", "backward"] * (6 + again)]


def test_the_backward_pass_does_not_wait_for_the_host(monkeypatch):
    log, finite = [], GraphedLoss._finite

    def asked(graphed):
        log.append("asked")
        return finite(graphed)

    monkeypatch.setattr(GraphedLoss, "_finite", asked)
    run("generator", log)
    assert log == ["capture", *["forward", "backward", "asked"] * 6]


def test_a_network_that_is_finite_for_nothing():
    networks, batch, *_ = setting(n=2)
    with torch.no_grad():
        networks.generator.module.unet.conv_out.bias.fill_(torch.nan)
    step = generator_update(networks, OBJECTIVE, wrap=lambda compute, leave_out: GraphedLoss(
        compute, leave_out, capture=replayed([])))
    with pytest.raises(NothingFinite, match="not finite for any input"):
        step([batch])


def test_other_shapes_are_refused():
    networks, batch, *_ = setting(n=4)
    step = generator_update(networks, OBJECTIVE, wrap=lambda compute, leave_out: GraphedLoss(
        compute, leave_out, capture=replayed([])))
    step([batch])
    with pytest.raises(ValueError, match=r"captured for a tensor of shape \(4,.*got \(2,"):
        step(micro_batches(batch, 2))


def test_all_are_warmed_up_before_the_first_capture():
    """One update after the other, as a trainer does; what they come to is the same."""
    results = []
    for early in (False, True):
        log, seen = [], []
        networks, batch, *_ = setting(n=2)
        updates = [make(networks, OBJECTIVE, wrap=lambda compute, leave_out, log=log: GraphedLoss(
            compute, leave_out, capture=replayed(log))) for make in UPDATES.values()]
        networks.teacher.register_forward_pre_hook(lambda *_, log=log, seen=seen: seen.append(list(log)))
        if early:
            for update in updates:
                update.warm_up(batch)
        assert bool(seen) is early and log == []
        sums = [update([batch]) for update in updates]
        assert log == ["capture", "forward", "backward"] * 2
        results.append([*(s.loss for s in sums), *networks.generator.gradients().values()])
    torch.testing.assert_close(*results, rtol=0, atol=0)
