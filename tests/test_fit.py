"""`train.micro_batch: "auto"`: the size that is chosen, from tensors that are really made."""

import functools
import json

import pytest
import torch
from conftest import fork_training, free_port, losses

from sidfast.common.errors import UserError
from sidfast.config.schema import build_config
from sidfast.planning import fit
from sidfast.planning.planner import Planner
from sidfast.teachers.load import load_meta_teacher, load_teacher

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher(tiny_teacher):
    return load_teacher(str(tiny_teacher))


@pytest.fixture
def alone(monkeypatch):
    """One process that has joined nobody."""
    monkeypatch.setattr(fit, "_agreed", lambda size: size)


def config_of(tiny_config, batch_size, **sections):
    train = tiny_config["train"] | {"batch_size": batch_size, "micro_batch": "auto"}
    return build_config(tiny_config | {"train": train} | sections, "test")


@pytest.mark.parametrize("batch_size, processes, chosen", [(12, 1, 12), (12, 2, 6), (96, 1, 32), (35, 1, 7)])
def test_the_largest_that_divides_the_batch(tiny_config, teacher, alone, monkeypatch, batch_size, processes, chosen):
    monkeypatch.setattr(fit, "_memory", lambda device: 1e15)
    config = fit.find_micro_batch(config_of(tiny_config, batch_size), teacher, processes, CPU)
    assert config.train.micro_batch == chosen and config.train.batch_size == batch_size


SMALL_BUCKETS = {"stage": 1, "reduce_bucket_size": 1000}  # (DeepSpeed's own take a GiB)


@pytest.mark.parametrize("sections", [
    {}, {"deepspeed": {"bf16": {"enabled": True}, "zero_optimization": SMALL_BUCKETS}},
    {"speed": {"gradient_checkpointing": True}}], ids=["fp32", "bf16", "recomputed"])
def test_the_largest_that_fits(tiny_config, teacher, alone, monkeypatch, sections):
    """Memory between what two sizes need by the planner's count, which comes from shapes alone."""
    config = config_of(tiny_config, 16, **sections)
    plain = config.model_copy(update={"speed": config.speed.model_copy(update={"fused": False})})          # as on a CPU
    planner = Planner(plain, load_meta_teacher(str(teacher.folder)))
    monkeypatch.setattr(fit, "Planner", functools.partial(Planner, counted={}))      # (both times the same updates)
    small, middle, large = (planner.option(*planner.configured(), m, config.speed.gradient_checkpointing, 1).bytes
                            for m in (4, 8, 16))
    for memory, chosen in (((small + middle) / 2, 4), ((middle + large) / 2, 8)):
        monkeypatch.setattr(fit, "_memory", lambda device, memory=memory: memory)
        assert fit.find_micro_batch(config, teacher, 1, CPU).train.micro_batch == chosen


def test_what_does_not_fit(tiny_config, teacher, alone, monkeypatch):
    monkeypatch.setattr(fit, "_memory", lambda device: 1e5)
    with pytest.raises(UserError, match=r"not even 1 fits: it needs .* GiB of .*`sidfast plan`"):
        fit.find_micro_batch(config_of(tiny_config, 8), teacher, 1, CPU)
    with pytest.raises(UserError, match=r"batch_size \(9\) must be a multiple of the number of processes \(2\)"):
        fit.find_micro_batch(config_of(tiny_config, 9), teacher, 2, CPU)


def test_a_run(write_config, tmp_path):
    """The number is in the run's config.json; the curve is that of a run that was given it."""
    port = free_port()
    for name, size in (("auto", "auto"), ("given", 4)):
        config = write_config(f"{name}.json", **{"train.micro_batch": size, "train.steps": 2})
        done = fork_training(config, tmp_path / name, port)
        assert done.wait() == 0, done.stderr.read()
    kept = json.loads((tmp_path / "auto" / "config.json").read_text())
    assert kept["config"]["train"]["micro_batch"] == 4
    assert losses(tmp_path / "auto") == losses(tmp_path / "given")
