"""Whole runs with each kind of synthetic data: interrupted, split, on two processes, sharded."""

import pytest
import torch
from conftest import losses, run_jobs

from sidfast.checkpoints.store import read_tensors

SHARED = ({"degradation": "noise", "strength": 0.2}, {"speed": {"share_generator_forward": True}})
STALE, EMA = ({"source": "stale", "stale_by": 2}, {}), ({"source": "ema"}, {"ema": {"half_life": 8}})
SPARSE = ({"source": "stale", "stale_by": 2, "stale_every": 2}, {})
STEPS = ({"source": "multistep", "steps": 3, "teacher_share": 0.5, "teacher_steps": 2, "degradation": "noise",
          "strength": 0.2, "z_per_prompt": 2}, {})


def jobs(config, folder, train, **sources):
    """Training jobs: {name: (the `synthetic` section, other sections)} with other values of `train`."""
    return [{"config": config | {"train": config["train"] | {"steps": 6, "save_every": 3} | train, "synthetic": section,
                                 **more}, "out": str(folder / name)} for name, (section, more) in sources.items()]


def sharded(source, stage):
    return source[0], source[1] | {"deepspeed": {"zero_optimization": {"stage": stage}}}


@pytest.fixture(scope="module")
def runs(tiny_config, tmp_path_factory):
    """Runs of six steps in one process: whole ones, and others in two pieces."""
    folder = tmp_path_factory.mktemp("synthetic")
    at_once, half = {"ema": {"half_life": 0}}, {"steps": 4, "save_every": 4}
    run_jobs([*jobs(tiny_config, folder, {}, base=({}, at_once), same=({"source": "ema"}, at_once), ema=EMA),
              *jobs(tiny_config, folder, {"save_every": 1, "keep": 9}, stale=STALE),
              *jobs(tiny_config, folder, {}, shared=SHARED),
              *jobs(tiny_config, folder, {"fake_score_factor": 2}, shared_wide=SHARED),
              *jobs(tiny_config, folder, half, stale_cut=STALE, ema_cut=EMA, shared_cut=SHARED),
              *jobs(tiny_config, folder, {}, stale_cut=STALE, ema_cut=EMA, shared_cut=SHARED)], folder, 1, 29811)
    return folder


@pytest.fixture(scope="module")
def more_runs(tiny_config, runs):
    half = {"steps": 4, "save_every": 4}
    run_jobs([*jobs(tiny_config, runs, {"save_every": 1, "keep": 9}, sparse=SPARSE),
              *jobs(tiny_config, runs, {}, steps=STEPS),
              *jobs(tiny_config, runs, {"micro_batch": 4}, one_pass=STEPS),
              *jobs(tiny_config, runs, half, sparse_cut=SPARSE, steps_cut=STEPS),
              *jobs(tiny_config, runs, {}, sparse_cut=SPARSE, steps_cut=STEPS),
              # Last: DeepSpeed's ZeRO 3 leaves its own torch.nn.functional.linear behind in the process.
              *jobs(tiny_config, runs, {}, steps_sharded=sharded(STEPS, 3), ema_sharded=sharded(EMA, 3),
                    stale_sharded=sharded(STALE, 2))], runs, 1, 29812)
    return runs


@pytest.fixture(scope="module")
def pairs(tiny_config, more_runs):
    """The same on two processes; one goes on in another stage, from what one process left."""
    [moved] = jobs(tiny_config, more_runs, {}, moved=sharded(STALE, 3))
    moved["resume"] = str(more_runs / "stale" / "checkpoints" / "step-00000004")
    run_jobs([*jobs(tiny_config, more_runs, {}, steps_pair=STEPS, ema_pair=sharded(EMA, 3),
                    stale_pair=sharded(STALE, 1)), moved], more_runs, 2, 29813)
    return more_runs


def assert_goes_on(runs, name):
    assert losses(runs / f"{name}_cut") == losses(runs / name) != losses(runs / "base")
    for network in ("generator", "fake_score"):
        a, b = (read_tensors(runs / run / "checkpoints" / "step-00000006", network, "weights")
                for run in (name, f"{name}_cut"))
        assert a and all(torch.equal(a[key], b[key]) for key in a)


def assert_same_curve(runs, name, other):
    want, got = losses(runs / name), losses(runs / other)
    want = want[len(want) - len(got):]
    assert got
    for (_, *a), (_, *b) in zip(want, got, strict=True):
        assert a == pytest.approx(b, rel=1e-3)


def assert_as_old_as(runs, name, by, every):
    """The copies that a checkpoint keeps are the generator's weights of the steps before, and no more than needed."""
    for step in (4, 6):
        folder = runs / name / "checkpoints"
        files = (folder / f"step-{step:08d}").glob("generator.stale_*")
        kept = {int(f.name.split("_")[1].split("-")[0]) for f in files}
        oldest = max(0, (step - 1 - by) // every * every)
        assert kept == set(range(oldest, step, every))
        for version in kept - {0}:
            got = read_tensors(folder / f"step-{step:08d}", "generator", f"stale_{version:08d}")
            want = read_tensors(folder / f"step-{version:08d}", "generator", "weights")
            assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)


@pytest.mark.slow
def test_average_without_memory_is_the_generator(runs):
    assert losses(runs / "same") == losses(runs / "base") and len(losses(runs / "base")) == 6


@pytest.mark.slow
def test_shared_images_in_larger_passes(runs):
    for (_, *got), (_, *want) in zip(losses(runs / "shared_wide"), losses(runs / "shared"), strict=True):
        assert got == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("name", ["stale", "ema", "shared"])
def test_an_interrupted_run_goes_on_exactly(runs, name):
    assert_goes_on(runs, name)


@pytest.mark.slow
def test_copies_are_as_old_as_they_should_be(runs):
    assert_as_old_as(runs, "stale", 2, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sparse", "steps"])
def test_more_interrupted_runs_go_on_exactly(more_runs, name):
    assert_goes_on(more_runs, name)


@pytest.mark.slow
def test_copies_every_few_steps(more_runs):
    assert_as_old_as(more_runs, "sparse", 2, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name, other", [("steps", "one_pass"), ("steps", "steps_sharded"), ("ema", "ema_sharded"),
                                         ("stale", "stale_sharded")])
def test_same_curve_however_it_is_split(more_runs, name, other):
    assert_same_curve(more_runs, name, other)


@pytest.mark.slow
@pytest.mark.parametrize("name, other", [("steps", "steps_pair"), ("ema", "ema_pair"), ("stale", "stale_pair"),
                                         ("stale", "moved")])
def test_same_curve_on_two_processes(pairs, name, other):
    assert_same_curve(pairs, name, other)
