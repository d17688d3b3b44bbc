"""What TensorBoard and Weights & Biases are told of a run; the second by a stand-in for its library."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from helpers_input import fails
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sidfast import train
from sidfast.common.errors import UserError
from sidfast.config.schema import load_config
from sidfast.monitoring.trackers import tag
from sidfast.publishing.grid import image_grid
from sidfast.runs.directory import RunDirectory

VALUES = {"fake_score_loss": 0.5, "peak_gib": 2.0, "seconds/data": 0.25, "share_of_peak": None, "images": 8}
GRID = image_grid({"a": [Image.new("RGB", (64, 64), "red")]}, ["x"])
TAGS = {"loss/fake_score", "memory/peak_gib", "seconds/data", "progress/images"}


def write_run(out, config, step=0):
    """A run directory with a line of metrics and a sample grid of the step after `step`."""
    run = RunDirectory(out, config, step)
    run.log(step + 1, VALUES)
    run.sample(step + 1, GRID)
    run.close()
    return run


def test_tensorboard_has_groups_samples_and_settings(write_config, tmp_path):
    out = tmp_path / "run"
    write_run(out, load_config(write_config(**{"train.seed": 977})))
    board = EventAccumulator(str(out / "tensorboard")).Reload()
    assert set(board.Tags()["scalars"]) == TAGS
    assert [(e.step, e.value) for e in board.Scalars("loss/fake_score")] == [(1, 0.5)]
    image, = board.Images("samples")
    assert (image.step, image.width, image.height) == (1, *GRID.size)
    text, = board.Tensors("configuration/text_summary")
    assert b'"seed": 977' in text.tensor_proto.string_val[0]
    line, = (out / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 1} | VALUES      # (its keys are as they were)


@pytest.mark.parametrize("key, name", [
    ("generator_loss", "loss/generator"), ("images_per_s", "speed/images_per_s"), ("non_finite", "non_finite/all"),
    ("non_finite/generator", "non_finite/generator"), ("host_peak_gib", "memory/host_peak_gib"),
    ("evaluation/fid", "evaluation/fid"), ("of_a_later_version", "of_a_later_version")])
def test_tag(key, name):
    assert tag(key) == name


class StandIn:
    """The parts of the library wandb that are used."""

    def __init__(self, fault=None):
        self.fault, self.calls = fault, []

    def init(self, **options):
        if self.fault == "init":
            raise RuntimeError("api_key not configured (no-tty)\nmore")
        self.calls.append(("init", options))
        return SimpleNamespace(log=self._log, define_metric=lambda *_, **__: None,
                               finish=lambda: self.calls.append(("finish",)))

    def Image(self, picture):
        return np.asarray(picture).shape

    def _log(self, values):
        if self.fault == "log":
            raise RuntimeError("the network is gone")      # (no OSError)
        self.calls.append(("log", values))


def tracked(write_config):
    return load_config(write_config(**{"train.tracker": "wandb"}))


def test_wandb_is_told_the_same(write_config, tmp_path, monkeypatch):
    """A run that goes on is the same run there, another run directory another."""
    library = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", library)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.setattr("sidfast.runs.directory._now", lambda: "2026-12-01T17:55:03+00:00")  # (of both)
    for name, step in (("a", 0), ("a", 1), ("b", 0)):
        write_run(tmp_path / name, tracked(write_config), step)
    begun = [options for kind, *rest in library.calls if kind == "init" for options in rest]
    assert begun[0]["id"] == begun[1]["id"] != begun[2]["id"] and {o["resume"] for o in begun} == {"allow"}
    assert [(o["name"], o["project"]) for o in begun] == [("a", "sidfast"), ("a", "sidfast"), ("b", "sidfast")]
    assert begun[0]["config"]["train"]["tracker"] == "wandb"
    told = [rest[0] for kind, *rest in library.calls if kind == "log"]
    assert told[0] == {"loss/fake_score": 0.5, "memory/peak_gib": 2.0, "seconds/data": 0.25, "progress/images": 8,
                       "step": 1} and told[0].keys() - {"step"} == TAGS
    assert told[1] == {"samples": (GRID.height, GRID.width, 3), "step": 1} and told[2]["step"] == 2
    assert [kind for kind, *_ in library.calls].count("finish") == 3


def test_wandb_that_fails_on_the_way_costs_nothing(write_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", StandIn("log"))
    run = write_run(tmp_path / "run", tracked(write_config))
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "Weights" in line] == [
        "sidfast: Weights & Biases' record could not be written: the network is gone in "
        f"{tmp_path / 'run'}; training goes on"]
    assert run.has_sample(1) and json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["images"] == 8


def test_wandb_that_is_missing_or_refuses(write_config, tmp_path, monkeypatch, capsys):
    """A line before anything is written; one where the library does not start."""
    path = write_config(**{"train.tracker": "wandb"})
    monkeypatch.setitem(sys.modules, "wandb", None)
    line = fails(capsys, train.main, "--config", path, "--out", tmp_path / "run")
    assert "train.tracker: wandb needs wandb" in line and "pip install 'sidfast[wandb]'" in line
    assert not (tmp_path / "run").exists()
    monkeypatch.setitem(sys.modules, "wandb", StandIn("init"))
    with pytest.raises(UserError, match=r"^train.tracker: wandb does not start \(api_key not configured \(no-tty\)\)$"):
        RunDirectory(tmp_path / "run", tracked(write_config), 0)
