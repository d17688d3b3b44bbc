"""A run directory that cannot be taken, or gone on with: one clear line, exit code 2, and nothing written or lost."""

import json
import shutil

import pytest
from helpers_input import edit, fails
from test_full_disk import files_up_to

from sidfast import train
from sidfast.common import files
from sidfast.common.errors import RunError
from sidfast.config.schema import load_config
from sidfast.runs import directory as run_module
from sidfast.runs.directory import RunDirectory, open_run
from sidfast.runs.identity import describe_inputs
from sidfast.runs.lock import NAME as LOCK
from sidfast.teachers.load import load_teacher


def test_folder_of_another_run(capsys, write_config, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    first = load_config(write_config())
    (run / "config.json").write_text(json.dumps({"config": first.model_dump()}))
    before = {p: p.read_bytes() for p in run.iterdir()}
    other = write_config("other.json", **{"guidance.kappa4": 3.0})
    line = fails(capsys, train.main, "--config", other, "--out", run)
    assert "guidance.kappa4 is 1.5 there and 3.0 here" in line
    assert "already" in fails(capsys, train.main, "--config", write_config(), "--out", run, "--resume", "never")
    assert {p: p.read_bytes() for p in run.iterdir()} == before


@pytest.fixture
def begun(write_config, tiny_teacher, tmp_path):
    """(configuration, run directory) of a run with checkpoints and an export, as far as its start looks at them."""
    teacher, prompts, run = tmp_path / "teacher", tmp_path / "prompts.txt", tmp_path / "run"
    shutil.copytree(tiny_teacher, teacher)
    prompts.write_text("a red circle\n")
    path = write_config(**{"model.teacher": str(teacher), "data.prompts": str(prompts), "evaluation.images": 0})
    config = load_config(path)
    for name in ("checkpoints/step-00000008", "export", "samples"):
        (run / name).mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({
        "config": config.model_dump(), "inputs": describe_inputs(config, load_teacher(str(teacher)))}))
    return path, run


@pytest.mark.parametrize("change, words", [
    (edit("../teacher/scheduler/scheduler_config.json", prediction_type="v_prediction"), "model.teacher is not what"),
    (lambda run: (run.parent / "prompts.txt").write_text("a blue circle\n"), "data.prompts is not what it was"),
    (lambda run: shutil.rmtree(run / "checkpoints"), "its checkpoints are gone"),
    (lambda run: (run / "checkpoints" / "step-00000008").rmdir(), "its checkpoints are gone"),
    (lambda run: ((run / "checkpoints" / "step-00000008").rename(run / "checkpoints" / "step-8.bak")), "are gone"),
    (lambda run: ((run / "checkpoints").rename(run.parent / "c"), (run / "checkpoints").symlink_to("/scratch/none")),
     "is not there"),
    (lambda run: ((run / "samples").rmdir(), (run / "samples").write_text("x")), "is a file, where a run has a folder"),
], ids=["teacher", "prompts", "no-checkpoints", "unmounted", "only-copies", "link", "file"])
def test_run_whose_parts_were_exchanged(capsys, begun, change, words):
    config, run = begun
    change(run)
    before = sorted(run.rglob("*"))
    assert words in fails(capsys, train.main, "--config", config, "--out", run)
    assert sorted(run.rglob("*")) == before


def test_folder_that_is_no_run(capsys, write_config, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    line = fails(capsys, train.main, "--config", write_config(), "--out", tmp_path / "thesis")
    assert "holds no run" in line
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


@pytest.mark.parametrize("out, words", [
    ("/dev/null/x", "/dev/null is no folder"), ("FILE", "is a file"), ("/proc/foo/bar", "written to /proc ("),
    ("FILE/x/y", "FILE is no folder"), ("LINK", "LINK is no folder"), ("new/" + "x" * 300, "File name too long"),
    ("", "--out '': is empty"), ("r\udcc3\udcbcn", "set LC_ALL=C.UTF-8")], ids=lambda v: ascii(v[:20]))
def test_out_that_takes_no_folder(capsys, write_config, tmp_path, out, words):
    (tmp_path / "FILE").write_text("x")
    (tmp_path / "LINK").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    config = write_config(**{"train.steps": 1})
    line = fails(capsys, train.main, "--config", config, "--out", tmp_path / out if out else "")
    assert words in line
    assert sorted(tmp_path.rglob("*")) == sorted([*before, config])


def test_folder_without_permission(capsys, write_config, tmp_path, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)                 # (root is refused nothing)
    line = fails(capsys, train.main, "--config", write_config(), "--out", tmp_path / "run")
    assert f"nothing can be written to {tmp_path} (Permission denied)" in line


@pytest.mark.parametrize("begun", [False, True], ids=["new", "begun"])
def test_full_disk(capsys, write_config, tmp_path, begun):
    """Said before anything is written, or, if it is full just then, as a run that cannot begin; no part of a file is
    left, and with room again the same command begins, or goes on."""
    path, run = write_config(), tmp_path / "run"
    config = load_config(path)
    if begun:
        RunDirectory(run, config, 0).close()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != LOCK}
    with files_up_to(0):
        line = fails(capsys, train.main, "--config", path, "--out", run)
        assert f"--out {run}: nothing can be written to {run if begun else tmp_path} (File too large)" in line
        assert run.exists() == begun
        with pytest.raises(RunError, match=f"the run cannot begin: File too large in {run}"):
            RunDirectory(run, config, 0)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != LOCK} == before
    open_run(run, config, "auto")
    RunDirectory(run, config, 0).close()


@pytest.mark.parametrize("where", ["describe", "sweep", "write", "after"])
def test_run_killed_as_it_begins_can_begin_again(write_config, tmp_path, monkeypatch, where):
    """config.json is the first file there, or none but those that say nothing."""
    class Killed(BaseException):
        pass

    def kill(*_, **__):
        raise Killed

    def kill_writing(path, text):
        (path.parent / ".sidfast-0123456789abcdef.partial").write_text(text[:9])
        raise Killed

    config, run = load_config(write_config()), tmp_path / "run"
    with monkeypatch.context() as patch:
        name, what = {"describe": ("_git_commit", kill), "sweep": ("sweep", kill), "after": ("LineFile", kill),
                      "write": ("write_atomically", kill_writing)}[where]
        patch.setattr(run_module, name, what)
        with pytest.raises(Killed):
            RunDirectory(run, config, 0)
    assert run.exists() == (where != "describe") and (run / "config.json").exists() == (where == "after")
    open_run(run, config, "auto")
    RunDirectory(run, config, 0).close()
    assert {"config.json", "samples", "tensorboard"} == {p.name for p in run.iterdir()}


@pytest.mark.parametrize("name, content, words", [
    ("metrics.jsonl", '{"step": 1}\n5\n', "metrics.jsonl, line 2"),
    ("metrics.jsonl", '{"step": 1}\n{"st\n{"step": 3}\n', "metrics.jsonl, line 2"),
    ("metrics.jsonl", '{"step": "1"}\n', "metrics.jsonl, line 1"),
    ("spikes.jsonl", "[]\n", "spikes.jsonl, line 1"),
    ("evaluation.json", '{"start": {', "evaluation.json: is damaged"), ("evaluation.json", "5", "evaluation.json"),
    ("evaluation.json", '{"start": 5}', "evaluation.json"), ("evaluation.json", "[" * 100_000, "evaluation.json")],
    ids=["number", "middle", "text", "list", "broken", "no-section", "no-values", "deep"])
def test_damaged_run(capsys, write_config, tmp_path, name, content, words):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"config": load_config(write_config()).model_dump()}))
    (run / name).write_text(content)
    before = {p: p.read_bytes() for p in run.iterdir()}
    assert words in fails(capsys, train.main, "--config", write_config(), "--out", run)
    assert {p: p.read_bytes() for p in run.iterdir()} == before


def test_resume_from_nothing(capsys, write_config, tmp_path):
    line = fails(capsys, train.main, "--config", write_config(), "--out", tmp_path / "run", "--resume", tmp_path / "x")
    assert "--resume" in line and "state.json" in line
    assert not (tmp_path / "run").exists()
