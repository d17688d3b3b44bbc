"""Updates that sum gradients themselves, on the CPU: as written, and with what stands around CUDA graphs, where passes
run anew in the place of replays."""

import pytest
import torch
from helpers_method import micro_batches, objective_of, poison, setting
from torch.utils._python_dispatch import TorchDispatchMode

from sidfast.common.errors import NothingFinite
from sidfast.engines import accumulate as summed_module
from sidfast.engines import flat as flat_module
from sidfast.engines.accumulate import GradientAccumulator, GradientBuffers
from sidfast.engines.module import EngineModule
from sidfast.engines.update import fake_score_update, generator_update

UPDATES = {"generator": generator_update, "fake_score": fake_score_update}
OBJECTIVE = objective_of(1.5, 2, 0.5, 1.5, alpha=0.5)


def replayed(log):
    """A stand-in for `Graphs.capture`: a replay calls the function and writes into the tensors of the first call."""

    def capture(function):
        static = [v.detach().clone() for v in function() or ()]

        def replay():
            log.append(function.func.__name__.removeprefix("_run_"))
            for old, new in zip(static, function() or (), strict=True):
                old.copy_(new.detach())

        return replay, static

    return capture


def run(engine, log=None, flat=True, **options):
    """(Sums and the gradients so far after two updates of three micro-batches each); with a log, as if captured."""
    networks, batch, *_ = setting(n=6, accumulation=1 if flat else 3, flat=flat, **options)
    step = UPDATES[engine](networks, OBJECTIVE, capture=None if log is None else replayed(log))
    poison(batch, *([3, 4, 5] if options else []))
    results = []
    for _ in range(2):
        sums = step(micro_batches(batch, 2))
        results.append((sums, getattr(networks, engine).gradients()))
        assert getattr(networks, engine).backwards == len(results) * (1 if flat else 3)
    return results


PASSES = ["forward", "backward"]


@pytest.mark.parametrize("captured", (False, True), ids=("as written", "captured"))
@pytest.mark.parametrize("engine, poisoned", [
    ("generator", None), ("generator", "generator"), ("generator", "fake_score"), ("generator", "teacher"),
    ("fake_score", None), ("fake_score", "generator"), ("fake_score", "fake_score")])
def test_sums_are_what_an_engine_accumulates(engine, poisoned, captured):
    """Poisoned: one sample of a micro-batch overflows inside a network, and both of another one."""
    options = {"poisoned": (poisoned,)} if poisoned else {}
    log = []
    for (want, want_gradients), (got, gradients) in zip(
            run(engine, flat=False, **options), run(engine, log if captured else None, **options), strict=True):
        for name in ("loss", "non_finite", "losses", "t"):
            torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-6, atol=0, msg=name)
        torch.testing.assert_close(got.images, want.images, equal_nan=True)      # of each micro-batch
        torch.testing.assert_close(gradients, want_gradients, rtol=1e-5, atol=1e-7)
    assert want.non_finite == (3 if poisoned else 0)
    again = PASSES if poisoned else []                   # of the second micro-batch and the third
    assert log == captured * [*PASSES, *PASSES, *again, *PASSES, *again] * 2


def test_the_backward_pass_does_not_wait_for_the_host(monkeypatch):
    """The flag is read when the backward pass is on its way."""
    log, read = [], GradientAccumulator._all_finite

    def asked(loss):
        log.append("asked")
        return read(loss)

    monkeypatch.setattr(GradientAccumulator, "_all_finite", asked)
    run("generator", log)
    assert log == [*PASSES, "asked"] * 6


@pytest.mark.parametrize("agreed", (True, False))
def test_processes_that_must_agree(agreed):
    """Where another process has a bad sample, this one does the same once more, and adds its gradient once."""
    results, asked = [], []

    def all_agree(flag):
        asked.append(flag)
        return bool(flag) and (agreed or len(asked) > 1)

    for agree in (None, all_agree):
        networks, batch, *_ = setting(n=2, flat=True)
        sums = generator_update(networks, OBJECTIVE, agree=agree)([batch])
        results.append([sums.loss, *networks.generator.gradients().values()])
    assert len(asked) == (1 if agreed else 2)
    torch.testing.assert_close(*results, rtol=0, atol=0)


def one_weight(kind, bias=False):
    return EngineModule(torch.nn.Linear(1, 1, bias=bias).to(kind), flat=True)


def product(unet, x):
    y = (unet.weight * x).sum()
    return y.float(), x.isfinite(), y.detach()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32], ids=str)
def test_sums_are_in_fp32(kind):
    """256 gradients of 1 / 256 and one of 1: in bf16 the sum would stop growing at once."""
    trained = one_weight(kind)
    loss = GradientAccumulator(trained, product, None)
    for k, value in enumerate([1.0] + [1 / 256] * 256):
        loss(1.0, k == 0, torch.full((1,), value, dtype=kind))
    loss.flush().backward()
    assert trained.flat.buckets[0].grad.dtype == kind and trained.flat.buckets[0].grad[0] == 2


def test_gradients_are_handed_over_one_chunk_after_the_other(monkeypatch):
    """An engine that takes each away never has two of them."""
    monkeypatch.setattr(flat_module, "BUCKET", 50)
    layers = torch.nn.Sequential(*(torch.nn.Linear(6, 6) for _ in range(4))).bfloat16()
    trained, order = EngineModule(layers, flat=True), []
    for bucket in trained.flat.buckets:
        bucket.register_post_accumulate_grad_hook(lambda _: order.append("taken"))

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket is torch.ops.aten._to_copy:
                order.append("made")
            return function(*args, **(kwargs or {}))

    loss = GradientAccumulator(trained, lambda net, x: (net(x).float().sum(), x.isfinite().all(1)), None)
    loss(1.0, True, torch.ones(2, 6, dtype=torch.bfloat16))
    with Casts():
        loss.flush().backward()
    assert order == ["made", "taken"] * len(trained.flat.buckets) and len(order) > 2


def test_small_gradients_are_added_together(monkeypatch):
    """So many and so many elements at most; a larger one by itself. A pass that an error ends leaves nothing behind."""
    monkeypatch.setattr(summed_module._BucketedAdd, "_TOGETHER", 3)
    monkeypatch.setattr(summed_module._BucketedAdd, "_SMALL", 12)
    together, add = [], summed_module.accumulate
    monkeypatch.setattr(summed_module, "accumulate", lambda sums, *rest: (
        together.append([s.numel() for s in sums]), add(sums, *rest)))
    net = torch.nn.ParameterList(torch.zeros(n) for n in (1, 2, 13, 3, 1, 5, 5, 5, 8, 4))
    trained = EngineModule(net, flat=True)

    def compute(net, x):
        return sum(k * p.sum() for k, p in enumerate(net)) * x, x.isfinite()

    def fail(_):
        raise RuntimeError("on purpose")

    loss, failing = GradientAccumulator(trained, compute, None), net[3].register_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        loss(1.0, True, torch.ones(()))
    failing.remove()
    together.clear()
    loss(1.0, True, torch.ones(()))
    assert sorted(n for group in together for n in group) == sorted(p.numel() for p in net)
    assert all(group == [13] or (len(group) <= 3 and sum(group) <= 12) for group in together)
    assert [13] in together and max(map(len, together)) == 3
    loss.flush().backward()
    for k, (_, gradient) in enumerate(trained.flat.named([c.grad for c in trained.flat.buckets])):
        assert torch.equal(gradient, torch.full_like(gradient, k))


def test_weights_and_unused_parameters():
    """A loss counts as often as its weight says; the gradient of a parameter that no loss depends on is 0."""
    trained = one_weight(torch.float32, bias=True)
    loss = GradientAccumulator(trained, product, None)
    for k, weight in enumerate((0.5, 4.0)):
        loss(weight, k == 0, torch.tensor([3.0 + k]))
    loss.flush().backward()
    assert dict(trained.flat.named([c.grad for c in trained.flat.buckets])) == {"weight": 0.5 * 3 + 4 * 4, "bias": 0}


def test_a_network_that_is_finite_for_nothing():
    networks, batch, *_ = setting(n=2, flat=True)
    with torch.no_grad():
        networks.generator.module.network.conv_out.bias.fill_(torch.nan)
    step = generator_update(networks, OBJECTIVE, capture=replayed([]))
    with pytest.raises(NothingFinite, match="not finite for any input"):
        step([batch])


def test_other_shapes_are_refused():
    networks, batch, *_ = setting(n=4, flat=True)
    step = generator_update(networks, OBJECTIVE, capture=replayed([]))
    step([batch])
    with pytest.raises(ValueError, match=r"captured for a tensor of shape \(4,.*got \(2,"):
        step(micro_batches(batch, 2))


def test_all_are_warmed_up_before_the_first_capture():
    """One update after the other, as a trainer does, with one set of sums; what they come to is the same."""
    results = []
    for early in (False, True):
        log, seen, sums = [], [], GradientBuffers()
        networks, batch, *_ = setting(n=2, flat=True)
        updates = [make(networks, OBJECTIVE, sums=sums, capture=replayed(log)) for make in UPDATES.values()]
        networks.teacher.register_forward_pre_hook(lambda *_, log=log, seen=seen: seen.append(list(log)))
        if early:
            for update in updates:
                update.warm_up(batch)
        assert bool(seen) is early and log == []
        losses = [update([batch]).loss for update in updates]
        assert log == PASSES * 2
        assert updates[0].summed._sums is updates[1].summed._sums
        results.append([*losses, *networks.generator.gradients().values()])
    torch.testing.assert_close(*results, rtol=0, atol=0)
