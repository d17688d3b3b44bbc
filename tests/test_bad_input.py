"""A user's mistake: one clear line on standard error, exit code 2, and nothing written or lost."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, fork_training
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from test_full_disk import files_up_to

from sidfast import cli, errors, files, train
from sidfast.config import load_config
from sidfast.environment import check_environment, omp_threads
from sidfast.errors import RunError
from sidfast.evaluation.attributes import AttributeChecker
from sidfast.networks.loading import load_teacher
from sidfast.teacher import build
from sidfast.training import run as run_module
from sidfast.training import speed
from sidfast.training.lock import NAME as LOCK
from sidfast.training.run import RunDirectory, describe_inputs, open_run


def fails(capsys, main, *args):
    """Run a command that must fail; returns its line."""
    try:
        code = main([str(a) for a in args])
    except SystemExit as stop:                           # argparse
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2, error
    lines = error.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("sidfast: "), error
    return lines[0]


@pytest.fixture
def broken_teacher(tiny_teacher, tmp_path):
    """broken_teacher(change) -> a copy of the tiny teacher after change(folder)."""

    def copy(change):
        folder = tmp_path / "teacher"
        shutil.copytree(tiny_teacher, folder)
        change(folder)
        return folder

    return copy


def edit(name, **values):
    def change(folder):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


@pytest.mark.parametrize("setting, words", [
    ("train.stepz=3", ["unknown key train.stepz", "train.steps"]),
    ("guidence.kappa1=3", ["unknown key guidence", "guidance"]),
    ("train.batch_size=many", ["train.batch_size", "'many'"]),
    ("train.batch_size=5", ["train.batch_size (5)", "train.micro_batch (2)"]),
    ("noise.t_min=990", ["noise.t_min (990)", "noise.t_max (979)"]),
    ("noise.density=uniform", ["noise.density", "'uniform'", "ddpm"]),
    ("noise.t_init=5000", ["noise.t_init (5000)", "1000"]),
    ("noise.t_max=5000", ["noise.t_max"]),
    ("deepspeed.bf16=true", ["deepspeed.bf16", "section"]),
    ("deepspeed.bf16.enabled=yes", ["deepspeed.bf16.enabled", "true or false", "'yes'"]),
    ("deepspeed.fp16.enabled=1", ["deepspeed.fp16.enabled", "true or false", "1"]),
    ("deepspeed.generator.gradient_clipping=true", ["deepspeed.generator.gradient_clipping", "a number", "True"]),
    ('deepspeed.zero_optimization.stage="3"', ["deepspeed.zero_optimization.stage", "0, 1, 2 or 3", "'3'"]),
    ("deepspeed.zero_stage=2", ["deepspeed.zero_stage", "did you mean zero_optimization?"]),
    ("deepspeed.bf16.enable=true", ["unknown key deepspeed.bf16.enable; did you mean deepspeed.bf16.enabled?"]),
    ("deepspeed.fake_score.zero_optimization.stag=2", ["deepspeed.fake_score.zero_optimization.stage?"]),
    ('deepspeed.zero_optimization.offload_optimizer={"devise": "cpu"}', ["deepspeed.zero_optimization.offload_optimizer"
                                                                         ".device?"]),
    ("deepspeed.zero_optimization.cpu_offload=true", ['.offload_optimizer to {"device": "cpu"} instead']),
    ('deepspeed.zero_optimization={"stage": 2, "offload_param": {"device": "cpu"}}', ["offload_param", "stage 3"]),
    ('deepspeed.zero_optimization={"stage": 2, "offload_optimizer": {"device": "nvme"}}', ["nvme", "stage 3"]),
    ('deepspeed.zero_optimization={"stage": 3, "offload_optimizer": {"device": "nvme"}}', ["nvme_path"]),
    ("deepspeed.zero_optimization.offload_optimizer=3", ["deepspeed.zero_optimization.offload_optimizer", "section"]),
    ("deepspeed.zero_optimization.reduce_bucket_size=-1", ["deepspeed.zero_optimization.reduce_bucket_size: ", "-1"]),
    ("noise.std=2", ["noise.std", "ddpm"]),
    ("optimizer.generator.lr=-1", ["optimizer.generator.lr", "-1"]),
    ("deepspeed.optimizer={}", ["deepspeed.optimizer", "optimizer"]),
    ("data.prompts=shapes:test", ["shapes:test", "shapes:train"]),
    ("data.prompts=/nowhere.txt", ["/nowhere.txt"]),
    ("model.teacher=/nowhere", ["model.teacher", "/nowhere"]),
    ("steps", ["--set steps"]),
], ids=lambda v: v if isinstance(v, str) else "")
def test_settings(capsys, write_config, tmp_path, setting, words):
    line = fails(capsys, train.main, "--config", write_config(), "--out", tmp_path / "run", "--set", setting)
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


@pytest.fixture
def launched(monkeypatch):
    """launched(**variables): an environment with these of a launcher's variables and no other."""
    def change(**variables):
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
                     "OMP_NUM_THREADS"):
            monkeypatch.setenv(name, variables.get(name, ""))
            if name not in variables:
                monkeypatch.delenv(name)

    return change


def test_batch_does_not_divide_among_processes(capsys, write_config, tmp_path, launched):
    launched(WORLD_SIZE="3")
    line = fails(capsys, train.main, "--config", write_config(), "--out", tmp_path / "run")
    assert "train.batch_size (4)" in line and "2 x 3 = 6" in line


@pytest.mark.parametrize("variables", [
    {"WORLD_SIZE": "abc"}, {"WORLD_SIZE": "0"}, {"WORLD_SIZE": "-1"}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "9" * 5000},
    {"RANK": "x"}, {"RANK": "3", "WORLD_SIZE": "2"}, {"RANK": "1"}, {"LOCAL_RANK": "a"}, {"LOCAL_SIZE": "0"},
    {"LOCAL_WORLD_SIZE": "two"}, {"OMP_NUM_THREADS": "0"}, {"OMP_NUM_THREADS": "many"}, {"OMP_NUM_THREADS": "2,"},
    {"MASTER_PORT": "abc"}, {"MASTER_PORT": "99999999"}, {"MASTER_PORT": "0", "WORLD_SIZE": "2"}],
    ids=lambda v: " ".join(f"{name}={value[:9]}" for name, value in v.items()))
def test_environment(capsys, write_config, tmp_path, launched, variables):
    launched(**variables)
    name, value = next(iter(variables.items()))
    for call in ((train.main, "--config", write_config(), "--out", tmp_path / "run"),
                 (cli.main, "report", "--run", tmp_path)):
        assert f"{name}={value[:400]}" in fails(capsys, *call)
    assert not (tmp_path / "run").exists()


def test_environment_that_is_fine(launched):
    launched()
    check_environment()
    assert omp_threads() is None and errors.speaks()
    launched(WORLD_SIZE="2", RANK="1", LOCAL_RANK="1", LOCAL_SIZE="2", MASTER_PORT="29500", OMP_NUM_THREADS="2,1")
    check_environment()
    assert omp_threads() == 2 and not errors.speaks()


@pytest.mark.parametrize("given, taken", [({}, "0"), ({"MASTER_PORT": "29777"}, "29777"),
                                          ({"WORLD_SIZE": "2", "RANK": "0"}, "29500")], ids=["alone", "given", "two"])
def test_port(monkeypatch, launched, given, taken):
    """A process alone takes a port that is free."""
    launched(OMP_NUM_THREADS=str(torch.get_num_threads()), **given)
    monkeypatch.setattr(train, "_meet", lambda *_: None)
    train.join()
    assert os.environ["MASTER_PORT"] == taken


def test_port_that_is_taken(write_config, tmp_path):
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        run = fork_training(write_config(), tmp_path / "run", port)
        output, error = run.communicate()
    assert run.returncode == 2 and output == "", error
    assert [line for line in error.splitlines() if "port" in line] == error.splitlines() and "Traceback" not in error
    assert f"sidfast: port {port} is taken on this machine" in error and "--master_port PORT" in error
    assert not (tmp_path / "run").exists()


def test_config_that_is_no_json(capsys, tmp_path):
    (tmp_path / "c.json").write_text('{"model": {\n"teacher": }')
    assert "c.json, line 2" in fails(capsys, train.main, "--config", tmp_path / "c.json")
    assert "no such file" in fails(capsys, train.main, "--config", tmp_path / "d.json")
    (tmp_path / "c.json").write_text('{"train": "x"}')
    assert "train: must be a section, not 'x'" in fails(capsys, train.main, "--config", tmp_path / "c.json")


@pytest.mark.parametrize("content, words", [
    (b"", "is empty"), (b"\n  \n", "empty lines"), (b"a cat\n\xff\xfe dog\n", "line 2: not UTF-8")],
    ids=["empty", "blank", "not-utf8"])
def test_prompts(capsys, write_config, tmp_path, content, words):
    (tmp_path / "prompts.txt").write_bytes(content)
    config = write_config(**{"data.prompts": str(tmp_path / "prompts.txt")})
    line = fails(capsys, train.main, "--config", config, "--out", tmp_path / "run")
    assert "prompts.txt" in line and words in line
    assert not (tmp_path / "run").exists()


def weights(part, change):
    """Change the tensors of a part, a dictionary."""

    def rewrite(folder):
        [path] = (folder / part).glob("*.safetensors")
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})

    return rewrite


def lose(tensors):
    del tensors[max(tensors)]


def spoil(tensors):
    tensors[max(tensors)].flatten()[0] = float("nan")


BROKEN_WEIGHTS = {
    f"{name}-{part}": (weights(part, change), f"{part}{words}") for part in ("unet", "vae", "text_encoder")
    for name, change, words in (("lost", lose, " lacks 1 of the network's tensors"), ("spoilt", spoil, ": "))}


@pytest.mark.parametrize("change, words", BROKEN_WEIGHTS.values(), ids=BROKEN_WEIGHTS)
def test_weights_that_are_missing_or_not_finite(capsys, write_config, broken_teacher, tmp_path, change, words):
    """They would be drawn at random, or end the run later: in training and in sampling alike."""
    folder = broken_teacher(change)
    config = write_config(**{"model.teacher": str(folder)})
    for call in ((train.main, "--config", config, "--out", tmp_path / "run"),
                 (cli.main, "sample", "--model", folder, "--prompt", "x", "--out", tmp_path / "x.png")):
        line = fails(capsys, *call)
        assert words in line and ("lacks" in words or "not finite" in line), line
    assert not (tmp_path / "run").exists() and not (tmp_path / "x.png").exists()


def test_weights_of_a_larger_network(capsys, write_config, broken_teacher, tmp_path):
    folder = broken_teacher(weights("unet", lambda tensors: tensors.update(more=torch.zeros(1))))
    config = write_config(**{"model.teacher": str(folder)})
    line = fails(capsys, train.main, "--config", config, "--out", tmp_path / "run")
    assert "does not know" in line and "(more)" in line


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "vae/config.json",
                                  "scheduler/scheduler_config.json"])
@pytest.mark.parametrize("text", ["5", "null", "[]"])
def test_json_that_is_no_object(capsys, write_config, broken_teacher, tmp_path, name, text):
    folder = broken_teacher(lambda folder: (folder / name).write_text(text))
    config = write_config(**{"model.teacher": str(folder)})
    line = fails(capsys, train.main, "--config", config, "--out", tmp_path / "run")
    assert f"{name} must be a JSON object" in line
    line = fails(capsys, cli.main, "sample", "--model", folder, "--prompt", "x", "--out", tmp_path / "x.png")
    assert f"{name} must be a JSON object" in line


@pytest.mark.parametrize("change, words", [
    (lambda f: (f / "model_index.json").unlink(), "model_index.json is missing"),
    (edit("unet/config.json", sample_size=None), "sample_size must be one whole number"),
    (edit("unet/config.json", sample_size=[8, 8]), "not [8, 8]"),
    (edit("unet/config.json", sample_size=0), "sample_size"),
    (edit("vae/config.json", scaling_factor="x"), "scaling_factor must be a number above 0, not 'x'"),
    (edit("scheduler/scheduler_config.json", beta_start=0.0), "levels of noise must rise"),
    (edit("scheduler/scheduler_config.json", num_train_timesteps=1), "levels of noise must rise"),
    (lambda f: (f / "tokenizer/tokenizer.json").unlink(), "tokenizer"),
    (lambda f: (f / "model_index.json").write_text("{"), "not valid JSON"),
    (lambda f: shutil.rmtree(f / "vae"), "no folder vae"),
    (edit("scheduler/scheduler_config.json", prediction_type="sample"), "'sample'"),
    (lambda f: (f / "scheduler/scheduler_config.json").write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler"}'),
     "FlowMatchEulerDiscreteScheduler"),
    (lambda f: next((f / "unet").glob("*.safetensors")).unlink(), "unet"),
    (lambda f: next((f / "unet").glob("*.safetensors")).write_bytes(b"x" * 100), "unet"),
    (edit("unet/config.json", _class_name="Transformer2DModel"), "UNet2DConditionModel"),
], ids=["no-index", "no-size", "two-sizes", "size-0", "factor", "beta", "one-level", "no-tokenizer", "broken-index",
        "no-vae", "prediction", "scheduler", "no-weights", "broken-weights", "no-unet"])
def test_teacher(capsys, write_config, broken_teacher, tmp_path, change, words):
    config = write_config(**{"model.teacher": str(broken_teacher(change))})
    line = fails(capsys, train.main, "--config", config, "--out", tmp_path / "run")
    assert "model.teacher" in line and words in line
    assert not (tmp_path / "run").exists()


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
    for name in ("checkpoints", "export", "samples"):
        (run / name).mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({
        "config": config.model_dump(), "inputs": describe_inputs(config, load_teacher(str(teacher)))}))
    return path, run


@pytest.mark.parametrize("change, words", [
    (edit("../teacher/scheduler/scheduler_config.json", prediction_type="v_prediction"), "model.teacher is not what"),
    (lambda run: (run.parent / "prompts.txt").write_text("a blue circle\n"), "data.prompts is not what it was"),
    (lambda run: (run / "checkpoints").rmdir(), "its checkpoints are gone"),
    (lambda run: ((run / "checkpoints").rmdir(), (run / "checkpoints").symlink_to("/scratch/none")), "is not there"),
    (lambda run: ((run / "samples").rmdir(), (run / "samples").write_text("x")), "is a file, where a run has a folder"),
], ids=["teacher", "prompts", "no-checkpoints", "link", "file"])
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
    ("", "--out '': is empty")], ids=lambda v: v[:20])
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


@pytest.mark.parametrize("where", ["describe", "claim", "write", "after"])
def test_run_killed_as_it_begins_can_begin_again(write_config, tmp_path, monkeypatch, where):
    """config.json is the first file there, or none but those that say nothing."""
    class Killed(BaseException):
        pass

    def kill(*_, **__):
        raise Killed

    def kill_writing(path, text):
        path.with_name(f".{path.name}.partial").write_text(text[:9])
        raise Killed

    config, run = load_config(write_config()), tmp_path / "run"
    with monkeypatch.context() as patch:
        name, what = {"describe": ("_git_commit", kill), "claim": ("claim", kill), "after": ("LineFile", kill),
                      "write": ("write_atomically", kill_writing)}[where]
        patch.setattr(run_module, name, what)
        with pytest.raises(Killed):
            RunDirectory(run, config, 0)
    assert run.exists() == (where != "describe") and (run / "config.json").exists() == (where == "after")
    open_run(run, config, "auto")
    RunDirectory(run, config, 0).close()
    assert {"config.json", "samples", "tensorboard"} <= {p.name for p in run.iterdir()}


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


@pytest.mark.parametrize("setting", ["speed.fused=true", "speed.cuda_graphs=true", "speed.attention=flash"])
def test_speed_that_needs_a_gpu(capsys, write_config, tmp_path, monkeypatch, setting):
    monkeypatch.setattr(speed, "INTERPRETED", False)
    monkeypatch.setattr(speed.torch.cuda, "is_available", lambda: False)
    line = fails(capsys, train.main, "--config", write_config(), "--out", tmp_path / "run", "--set", setting)
    assert setting.partition("=")[0] in line and "there is no GPU here" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content, refused", [
    ({"teacher/model_index.json": "{}", "teacher/unet/config.json": "{}"}, "teacher"),      # someone else's pipeline
    ({"clip/config.json": "{}", "clip/preprocessor_config.json": '{"size": {"shortest_edge": 224}}'}, "clip"),
    ({"checker/model.safetensors": "x"}, "checker"), ({"checker/notes.txt": "x"}, "checker"), ({"clip": "x"}, "clip")],
    ids=["pipeline", "clip", "checker", "notes", "file"])
def test_teacher_replaces_nothing_else(capsys, tmp_path, monkeypatch, content, refused):
    monkeypatch.setattr(build.train, "train_checker", None)                      # nothing is trained
    for name, text in content.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    line = fails(capsys, cli.main, "teacher", "--out", tmp_path, "--steps", "1")
    assert f"{tmp_path / refused} would be replaced" in line
    assert {str(p.relative_to(tmp_path)): p.read_text() for p in tmp_path.rglob("*") if p.is_file()} == content


@pytest.mark.parametrize("args, words", [
    (["--out", "/dev/null/x"], "/dev/null is no folder"), (["--out", "/proc/x"], "written to /proc ("),
    (["--out", __file__], "is a file"), (["--seed", "-1"], "--seed must be"),
    (["--seed", str(2**63)], "--seed must be at least 0 and below 2^63"),
], ids=["null", "proc", "file", "negative", "large"])
def test_teacher_finds_it_before_training(capsys, tmp_path, monkeypatch, args, words):
    monkeypatch.setattr(build.train, "train_checker", None)
    assert words in fails(capsys, cli.main, "teacher", "--steps", "1", "--out", tmp_path / "t", *args)
    assert not (tmp_path / "t").exists()


def test_teacher_replaces_its_own(tiny_teacher, tmp_path):
    build.check_out(ROOT / "assets")
    build.check_out(tmp_path / "new")
    (tmp_path / "teacher").mkdir()
    pipe = StableDiffusionPipeline.from_pretrained(tiny_teacher)
    clip = build.networks.build_clip(build.build_tokenizer())
    for text in ("first", "second"):
        build.check_out(tmp_path)
        build._write(tmp_path, pipe, clip, AttributeChecker(), build.build_tokenizer(), {}, text)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["checker", "clip", "teacher"]
        assert (tmp_path / "teacher" / "README.md").read_text() == text


def test_names_that_are_empty(capsys, tiny_teacher, tmp_path):
    assert "--config '': is empty" in fails(capsys, train.main, "--config", "")
    assert "--config '': is empty" in fails(capsys, cli.main, "plan", "--config", "")
    assert "--model '': is empty" in fails(capsys, cli.main, "sample", "--model", "", "--prompt", "x", "--out", "x.png")
    assert "STUDY.json '': is empty" in fails(capsys, cli.main, "ablate", "")


def test_resume_from_nothing(capsys, write_config, tmp_path):
    line = fails(capsys, train.main, "--config", write_config(), "--out", tmp_path / "run", "--resume", tmp_path / "x")
    assert "--resume" in line and "state.json" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("args, words", [
    (["--model", "/nowhere/else", "--prompt", "x"], "/nowhere/else"),
    (["--prompt", "x", "-n", "0"], "-n"),
    (["--prompt", "x", "-n", str(10**30)], f"-n {10**30} with 1 prompts: too many images"),
    (["--prompt", "x", "-n", "9" * 4300], "-n 999"),
    (["--prompt", "x", "-n", "9" * 4301], "-n: invalid int value"),
    (["--prompt", "caf\udce9"], "--prompt 'caf\\udce9': is not UTF-8"),
    (["--prompt", "\ud800"], "is not UTF-8"),
    (["--prompt", "x", "--out", "picture.jpg"], ".png"),
    (["--prompt", "x", "--out", "/nowhere/x.png"], "/nowhere"),
    (["--prompt", "x", "--out", "/proc/x.png"], "--out /proc/x.png: nothing can be written to /proc ("),
    (["--prompts", "/nowhere.txt"], "/nowhere.txt"),
    (["--prompt", "x", "--steps", "0"], "--steps (0) must be at least 1 and at most 1000"),
    (["--prompt", "x", "--steps", "1001"], "--steps (1001)"),
    (["--prompt", "x", "--guidance", "nan"], "--guidance (nan)"),
], ids=lambda v: "" if isinstance(v, str) else ascii(" ".join(v))[:40])
def test_sample(capsys, tiny_teacher, tmp_path, args, words):
    defaults = ["--model", str(tiny_teacher), "--out", str(tmp_path / "x.png")]
    assert words in fails(capsys, cli.main, "sample", *defaults, *args)
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("option", ["--seeds-per-prompt", "--seeds", "--resize", "--seed-offset"])
def test_numbers_of_an_evaluation_that_are_too_large(capsys, tiny_teacher, tmp_path, option):
    args = ["--model", tiny_teacher, "--prompts", "shapes:held_out", "--metrics", "clip", "--images", "2"]
    line = fails(capsys, cli.main, "evaluate", *args, "--out", tmp_path / "r.json", option, 10**30)
    assert option in line and str(10**30) in line


def test_reader_that_is_gone(write_config):
    """As in `... --dry-run | head -1`."""
    reading, writing = os.pipe()
    os.close(reading)
    script = "import sys; from sidfast.train import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", script, "--config", write_config(), "--dry-run"], cwd=ROOT,
                          stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_sample_works(tiny_teacher, tmp_path):
    from PIL import Image

    out = tmp_path / "grid.png"
    (tmp_path / "p.txt").write_text("a red circle\na blue square\n")
    args = ["sample", "--model", str(tiny_teacher), "--prompts", str(tmp_path / "p.txt"), "--steps", "2", "-n", "3"]
    assert cli.main([*args, "--out", str(out)]) == 0
    assert Image.open(out).size[0] > 2 * 128


def test_dry_run_prints_the_resolved_configuration(capsys, write_config, tmp_path):
    assert train.main(["--config", str(write_config()), "--out", str(tmp_path / "run"), "--dry-run"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["train"]["batch_size"] == 4 and printed["loss"]["alpha"] == 1.0
    assert not (tmp_path / "run").exists()
