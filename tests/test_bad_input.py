"""A user's mistake: one clear line on standard error, exit code 2, and nothing written or lost."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sidfast import cli, train


def fails(capsys, main, *args):
    """Run a command that must fail; returns its line."""
    code = main([str(a) for a in args])
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


def test_batch_does_not_divide_among_processes(capsys, write_config, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    line = fails(capsys, train.main, "--config", write_config(), "--out", tmp_path / "run")
    assert "train.batch_size (4)" in line and "2 x 3 = 6" in line


def test_config_that_is_no_json(capsys, tmp_path):
    (tmp_path / "c.json").write_text('{"model": {\n"teacher": }')
    assert "c.json, line 2" in fails(capsys, train.main, "--config", tmp_path / "c.json")
    assert "no such file" in fails(capsys, train.main, "--config", tmp_path / "d.json")


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
    from sidfast.config import load_config

    first = load_config(write_config())
    (run / "config.json").write_text(json.dumps({"config": first.model_dump()}))
    before = {p: p.read_bytes() for p in run.iterdir()}
    other = write_config("other.json", **{"guidance.kappa4": 3.0})
    line = fails(capsys, train.main, "--config", other, "--out", run)
    assert "guidance.kappa4 is 1.5 there and 3.0 here" in line
    assert "already" in fails(capsys, train.main, "--config", write_config(), "--out", run, "--resume", "never")
    assert {p: p.read_bytes() for p in run.iterdir()} == before


def test_folder_that_is_no_run(capsys, write_config, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    line = fails(capsys, train.main, "--config", write_config(), "--out", tmp_path / "thesis")
    assert "holds no run" in line
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


def test_resume_from_nothing(capsys, write_config, tmp_path):
    line = fails(capsys, train.main, "--config", write_config(), "--out", tmp_path / "run", "--resume", tmp_path / "x")
    assert "--resume" in line and "state.json" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("args, words", [
    (["--model", "/nowhere/else", "--prompt", "x"], "/nowhere/else"),
    (["--prompt", "x", "-n", "0"], "-n"),
    (["--prompt", "x", "--out", "picture.jpg"], ".png"),
    (["--prompt", "x", "--out", "/nowhere/x.png"], "/nowhere"),
    (["--prompts", "/nowhere.txt"], "/nowhere.txt"),
    (["--prompt", "x", "--steps", "0"], "--steps (0) must be at least 1 and at most 1000"),
    (["--prompt", "x", "--steps", "1001"], "--steps (1001)"),
    (["--prompt", "x", "--guidance", "nan"], "--guidance (nan)"),
], ids=lambda v: "" if isinstance(v, str) else " ".join(v))
def test_sample(capsys, tiny_teacher, tmp_path, args, words):
    defaults = ["--model", str(tiny_teacher), "--out", str(tmp_path / "x.png")]
    assert words in fails(capsys, cli.main, "sample", *defaults, *args)
    assert not (tmp_path / "x.png").exists()


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
