"""Evaluation while a run trains, on any reference, and the best export beside the last."""

import json
import os
import re
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, fork_training
from PIL import Image

from sidfast import cli, train
from sidfast.common.errors import UserError
from sidfast.config.schema import load_config
from sidfast.publishing.export import read_distillation
from sidfast.publishing.load import load_pipeline
from sidfast.runs.directory import RunDirectory
from sidfast.runs.evaluate import Evaluator, check_measures
from sidfast.runs.preview import Preview
from sidfast.teachers.load import load_teacher
from sidfast.training.loop import is_measured

CLIP = ROOT / "assets" / "clip"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Real images of 16 x 16, more than the CLIP has features, and prompts that are no captions of the shapes world."""
    root, rng = tmp_path_factory.mktemp("measures"), np.random.default_rng(0)
    (root / "real").mkdir()
    for i in range(130):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(root / "real" / f"{i}.png")
    (root / "prompts.txt").write_text("".join(f"cat number {i}\n" for i in range(130)))
    return root


@pytest.fixture
def config(write_config, place, tmp_path, monkeypatch):
    """config(**changes) -> the path of a configuration that measures on those."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def write(**changes):
        values = {"prompts": str(place / "prompts.txt"), "reference": str(place / "real"), "clip": str(CLIP),
                  "features": f"clip:{CLIP}", "images": 130, "every": 2, "batch_size": 65}
        return write_config(**{"data.prompts": str(place / "prompts.txt")} | {
            f"evaluation.{key}": value for key, value in (values | changes).items() if value is not None})

    return write


@pytest.fixture
def measuring(config, tiny_teacher, tmp_path):
    """A Evaluator of a run that has not trained, and its teacher."""
    run = RunDirectory(tmp_path / "run", load_config(config()), 0)
    yield Evaluator(load_config(config()), run, (16, 16), torch.device("cpu"), {}), load_teacher(str(tiny_teacher))
    run.close()


def test_a_run_measures_and_keeps_the_best(config, tmp_path, place):
    """One real run: numbers in metrics.jsonl, TensorBoard, evaluation.json, report; equal to the command's."""
    out = tmp_path / "run"
    path = config(metrics="fid,clip,kid")
    process = fork_training(path, out, 30111, "--set", "train.steps=4", "--set", "train.save_every=4")
    try:
        _, errors = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 0, errors[-2000:]
    known = json.loads((out / "evaluation.json").read_text())
    assert list(known) == ["start", "step 2", "end"] and [v["step"] for v in known.values()] == [0, 2, 4]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    curve = {line["step"]: line["evaluation/fid_small_clip"] for line in lines if "evaluation/fid_small_clip" in line}
    assert curve == {v["step"]: v["fid_small_clip"] for v in known.values()}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(out / "tensorboard"))
    board.Reload()
    assert {"evaluation/fid_small_clip", "evaluation/kid_small_clip", "evaluation/clip_score"} <= set(
        board.Tags()["scalars"])
    best = read_distillation(out / "best")
    winner = min(("step 2", "end"), key=lambda name: known[name]["fid_small_clip"])
    assert best["evaluation"] == known[winner] and best["best_by"] == "fid_small_clip"
    assert "KID (small CLIP)" in (out / "report.html").read_text()

    command = ["evaluate", "--model", out / "best", "--prompts", place / "prompts.txt", "--reference", place / "real",
               "--features", f"clip:{CLIP}", "--clip", CLIP, "--batch-size", "65", "--out", tmp_path / "r.json"]
    assert cli.main([str(part) for part in command]) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    for name, value in result["metrics"].items():        # (the export is fp16)
        assert value == pytest.approx(best["evaluation"][name], rel=0.02), name
    assert result["model"]["distillation"]["step"] == best["step"] and result["model"]["steps"] == 1


@pytest.mark.slow
def test_measures_of_a_run_killed_after_its_checkpoint(config, tmp_path):
    """They come when it goes on, and are those of a run that was left alone; sample grids come too."""
    out, path = tmp_path / "run", config(metrics="fid,clip")
    args = [path, out, 30112, "--set", "train.steps=4", "--set", "train.save_every=2", "--set", "train.samples=1",
            "--set", "train.sample_every=2"]
    known = []
    for _ in range(2):
        process = fork_training(*args)
        assert process.wait() == 0, process.stderr.read()[-2000:]
        curve = [line for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
                 if "evaluation/fid_small_clip" in line]
        known.append((json.loads((out / "evaluation.json").read_text()),
                      [(line["step"], line["evaluation/fid_small_clip"]) for line in curve],
                      (out / "samples" / "step-00000002.png").read_bytes()))
        (out / "samples" / "step-00000002.png").unlink()
        shutil.rmtree(out / "checkpoints" / "step-00000004")
        lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
        (out / "metrics.jsonl").write_text("".join(line for line in lines if "evaluation/" not in line
                                                   or json.loads(line)["step"] == 0))
        (out / "evaluation.json").write_text(json.dumps({"start": known[0][0]["start"]}))
    assert known[0] == known[1] and [step for step, _ in known[0][1]] == [0, 2, 4]


def test_what_is_due_as_a_run_is_stopped_comes_when_it_goes_on(config, tmp_path):
    out, path = tmp_path / "run", config(metrics="clip", images=10, every=1)
    sets = [f"--set=train.{key}" for key in ("samples=1", "sample_every=1", "save_every=1000")]
    process = fork_training(path, out, 30113, *sets, "--set", "train.steps=1000")
    while not (out / "samples" / "step-00000001.png").exists():
        assert process.poll() is None, process.stderr.read()[-2000:]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 0, process.stderr.read()[-2000:]
    step = int(re.search(r"stopped by SIGTERM after step (\d+)", process.stderr.read())[1])

    def made():
        return [(out / "samples" / f"step-{n:08d}.png").exists() for n in range(1, step + 1)], [
            line["step"] for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
            if "evaluation/clip_score" in line]

    assert made() == ([n < step for n in range(1, step + 1)], list(range(step)))
    process = fork_training(path, out, 30113, *sets, "--set", f"train.steps={step + 1}")
    assert process.wait() == 0, process.stderr.read()[-2000:]
    assert made() == ([True] * step, list(range(step + 2)))


def numbers(protocol="p", **values):
    return {"images": 130, "protocol": protocol, "intervals": {}, **values}


@pytest.mark.parametrize("values, kept", [
    ([3.0, 2.0, 2.5], 2), ([3.0, float("nan"), 4.0], 1), ([float("nan"), 5.0], 2), ([2.0, 2.0], 1)],
    ids=["lower", "not finite", "first not finite", "equal"])
def test_which_is_the_best(measuring, values, kept):
    judge, teacher = measuring
    pipe = Preview(judge.config, teacher, judge.run, {})._pipeline(teacher.network)
    for step, value in enumerate(values, 1):
        judge.keep_best(numbers(fid_small_clip=value), pipe, step)
    assert read_distillation(judge.run.out / "best")["step"] == kept


def test_the_record_survives(measuring):
    """A new process reads it from the export; one killed between two renames brings the old one back; and numbers of
    another protocol are no record."""
    judge, teacher = measuring
    best = judge.run.out / "best"
    pipe = Preview(judge.config, teacher, judge.run, {})._pipeline(teacher.network)
    judge.keep_best(numbers(fid_small_clip=3.0), pipe, 1)
    best.rename(best.with_name(".best.old"))
    again = Evaluator(judge.config, judge.run, (16, 16), torch.device("cpu"), judge.memo)
    again.keep_best(numbers(fid_small_clip=3.5), pipe, 2)
    assert read_distillation(best)["step"] == 1 and load_pipeline(best, "cpu")[1]
    again.keep_best(numbers("q", fid_small_clip=9.0), pipe, 3)
    assert read_distillation(best)["step"] == 3
    assert [p for p in os.listdir(judge.run.out) if p.startswith(".")] == []


@pytest.mark.parametrize("changes, words", [
    ({"prompts": "/nowhere.txt"}, ["evaluation.prompts /nowhere.txt"]),
    ({"prompts": None}, ["evaluation.images needs evaluation.prompts"]),
    ({"reference": "/nowhere"}, ["evaluation.reference /nowhere"]),
    ({"reference": None}, ["evaluation.reference: fid need"]),
    ({"features": None}, ["evaluation.features: the feature network is missing"]),
    ({"features": "clip:/nowhere"}, ["no CLIP in /nowhere"]),
    ({"features": "inception:/nowhere.pth"}, ["evaluation.features inception:/nowhere.pth: no such file"]),
    ({"clip": None}, ["evaluation.clip: the CLIP is missing"]),
    ({"metrics": "fdi"}, ["evaluation.metrics: unknown metric fdi"]),
    ({"images": 20}, ["evaluation.images: 20 are too few"]),
    ({"images": 131}, ["130 prompts are too few for 131 images"]),
    ({"best": "fid"}, ["evaluation.best: fid is not measured", "fid_small_clip"]),
    ({"metrics": "diversity"}, ["evaluation.metrics diversity", "give evaluation.seeds_per_prompt 2"]),
    ({"resize": 64}, ["size mismatch", "evaluation.resize"]),
], ids=lambda v: "" if isinstance(v, list) else " ".join(f"{k}={x}" for k, x in v.items()))
def test_refused_before_anything_is_written(config, tmp_path, capsys, changes, words):
    assert train.main(["--config", str(config(**changes)), "--out", str(tmp_path / "run")]) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith("sidfast: ") and all(word in line for word in words) and "\n" not in line, line
    assert not (tmp_path / "run").exists()


def test_size_is_checked_for_the_resolution_of_the_run(config, tiny_teacher):
    teacher = load_teacher(str(tiny_teacher))
    check_measures(load_config(config()), teacher, {})
    with pytest.raises(UserError, match="32 x 32, those of the reference 16 x 16"):
        check_measures(load_config(config(), ["model.resolution=32"]), teacher, {})


def test_exports_make_images_of_the_resolution_of_the_run(config, tiny_teacher, tmp_path):
    settings, teacher = load_config(config(images=0), ["model.resolution=32"]), load_teacher(str(tiny_teacher))
    run = RunDirectory(tmp_path / "run", settings, 0)
    preview = Preview(settings, teacher, run, {})
    preview.export(teacher.network.state_dict(), tmp_path / "export", 1)
    preview.wait()
    run.close()
    assert load_pipeline(tmp_path / "export", "cpu")[0]("x").images[0].size == (32, 32)
    shutil.rmtree(tmp_path / "export")


@pytest.mark.parametrize("every, total, steps", [(1600, 6400, [1600, 3200, 4800]), (2133, 6400, [2133, 4266]),
                                                 (3000, 6400, [3000, 6000]), (0, 10, []), (1, 3, [1, 2])])
def test_when_measures_are_made_along_a_run(every, total, steps):
    assert [step for step in range(1, total + 1) if is_measured(step, every, total)] == steps
