"""A study's worker: a run that was stopped is gone on with; its images, and what it cost."""

import json
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import losses, process_alone
from deepspeed import comm
from helpers_evaluate import ASSETS
from PIL import Image
from sidfast.kernels import backend
from test_stops import signal_in_step

from sidfast.accel import plan as speed
from sidfast.evaluation.evaluate import pipeline_generator
from sidfast.publishing.export import write_export
from sidfast.publishing.load import load_pipeline
from sidfast.studies import worker as module
from sidfast.studies.record import STRIP, is_final
from sidfast.studies.study import read_study
from sidfast.studies.worker import Worker
from sidfast.teachers.load import load_teacher
from sidfast.training.launch import join
from sidfast.training.loop import Loop

CPU = torch.device("cpu")


@pytest.fixture
def study(tiny_config, tmp_path):
    """Of one run of six steps, which is evaluated on prompts of a file."""
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    base = tiny_config | {"data": {"prompts": str(tmp_path / "prompts.txt")}}
    (tmp_path / "base.json").write_text(json.dumps(base))
    path = tmp_path / "study.json"
    path.write_text(json.dumps({
        "question": "?", "base": "base.json", "images": 24, "seeds": [0], "variants": {"a": {}},
        "evaluation": {"images": 2, "prompts": str(tmp_path / "prompts.txt"), "metrics": "clip",
                       "clip": str(ASSETS / "clip")}}))
    return read_study(path)


@pytest.fixture
def joined(monkeypatch):
    """As a worker's process is: alone, on plain PyTorch."""
    process_alone(monkeypatch)
    for one in (backend, speed):
        monkeypatch.setattr(one, "INTERPRETED", False)
    yield join()
    comm.destroy_process_group()


def test_a_stopped_run_is_gone_on_with(study, tmp_path, joined, monkeypatch):
    """From the step at which it was stopped, to the curve of a run that was left alone."""
    monkeypatch.setattr(Worker, "_evaluate", lambda self, folder: {"clip_score": 0.5})
    [run] = study.runs
    assert Worker(study, tmp_path / "whole", 1, joined)._train(run) == {"clip_score": 0.5}
    with monkeypatch.context() as patch:
        patch.setattr(*signal_in_step(3, signal.SIGTERM))
        with pytest.raises(SystemExit):
            Worker(study, tmp_path / "cut", 1, joined)._train(run)
    made, step = [], Loop._step
    monkeypatch.setattr(Loop, "_step", lambda loop: (step(loop), made.append(loop.progress.step)))
    assert Worker(study, tmp_path / "cut", 1, joined)._train(run) == {"clip_score": 0.5}
    assert made == [4, 5, 6]
    assert losses(tmp_path / "cut" / run.folder) == losses(tmp_path / "whole" / run.folder)


def test_images_of_a_run_have_noise_of_their_own(tiny_teacher, tmp_path, monkeypatch):
    """Side by side, those of the seeds 0, 1, ...: also of one prompt."""
    teacher, prompts = load_teacher(str(tiny_teacher)), ["a red circle", "a red circle", "x"]
    write_export(teacher.one_step_pipeline(teacher.network, 625), tmp_path / "export")
    monkeypatch.setattr(module, "sample_prompts", lambda study: prompts)
    module._strip(tmp_path / "export", SimpleNamespace(), CPU)
    got = torch.from_numpy(np.array(Image.open(tmp_path / "export" / STRIP))).movedim(2, 0)
    images = pipeline_generator(load_pipeline(tmp_path / "export", CPU)[0])(prompts, range(3))
    want = (torch.cat(list(images), 2) * 255).round().byte()
    assert got.shape == want.shape == (3, 16, 48) and (got.int() - want.int()).abs().max() <= 1
    assert not torch.equal(got[..., :16], got[..., 16:32])


def test_seconds_of_training():
    """Those of each interval between two lines, at its own rate; evaluations have lines of their own."""
    lines = [{"step": 0, "evaluation/fid": 3.0}, {"step": 2, "images": 16, "images_per_s": 8.0},
             {"step": 2, "evaluation/fid": 2.0}, {"step": 6, "images": 48, "images_per_s": 4.0}]
    assert module._training_seconds(lines) == 16 / 8 + 32 / 4


@pytest.mark.parametrize("status, final", [("done", True), ("diverged", True), ("failed", False)])
def test_which_runs_are_tried_again(status, final):
    assert is_final({"status": status}) is final and not is_final(None)
