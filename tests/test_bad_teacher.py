"""A teacher that is damaged, or would replace what is there: one clear line, exit code 2, nothing written or lost."""

import codecs
import shutil

import pytest
import torch
from conftest import ROOT
from diffusers import StableDiffusionPipeline
from helpers_input import edit, fails
from safetensors.torch import load_file, save_file

from sidfast import cli, train
from sidfast.evaluation.attributes import AttributeChecker
from sidfast.teachers.sd_shapes import build_clip
from sidfast.toy import build


@pytest.fixture
def broken_teacher(tiny_teacher, tmp_path):
    """broken_teacher(change) -> a copy of the tiny teacher after change(folder)."""

    def copy(change):
        folder = tmp_path / "teacher"
        shutil.copytree(tiny_teacher, folder)
        change(folder)
        return folder

    return copy


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


def byte_order_mark(name):
    """damage(folder): puts one in front of a file, as some editors do."""
    return lambda folder: (folder / name).write_bytes(codecs.BOM_UTF8 + (folder / name).read_bytes())


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
    (edit("unet/config.json", sample_size=None), "sample_size must be the side of its latents"),
    (edit("unet/config.json", sample_size=[8, 8, 8]), "not [8, 8, 8]"),
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
    (edit("model_index.json", text_encoder=[None, None]), "model_index.json has no text_encoder"),
    (byte_order_mark("vae/config.json"), "vae/config.json begins with a byte order mark"),
    (byte_order_mark("model_index.json"), "model_index.json begins with a byte order mark"),
], ids=["no-index", "no-size", "three-sizes", "size-0", "factor", "beta", "one-level", "no-tokenizer", "broken-index",
        "no-vae", "prediction", "scheduler", "no-weights", "broken-weights", "no-unet", "null", "mark",
        "mark-of-index"])
def test_teacher(capsys, write_config, broken_teacher, tmp_path, change, words):
    config = write_config(**{"model.teacher": str(broken_teacher(change))})
    line = fails(capsys, train.main, "--config", config, "--out", tmp_path / "run")
    assert "model.teacher" in line and words in line
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
    clip = build_clip(build.build_tokenizer())
    for text in ("first", "second"):
        build.check_out(tmp_path)
        build._write(tmp_path, pipe, clip, AttributeChecker(), build.build_tokenizer(), {}, text)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["checker", "clip", "teacher"]
        assert (tmp_path / "teacher" / "README.md").read_text() == text
