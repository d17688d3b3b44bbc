"""Folders and files that someone else made: no pickle is loaded, no code is run. Each would leave a marker."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers_checkpoint import write_checkpoint
from helpers_input import fails
from safetensors.torch import save_file

from sidfast import cli, train
from sidfast.checkpoints.format import read_state, seal
from sidfast.checkpoints.store import checkpoint_fault, content_fault, read_tensors
from sidfast.common.errors import UserError

CLIP = ROOT / "assets" / "clip"
NETWORKS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture
def marker(tmp_path):
    """A path that must not exist at the end of the test."""
    path = tmp_path / "marker"
    yield path
    assert not path.exists(), "untrusted code ran"


@pytest.fixture
def bomb(marker):
    """bomb(path) writes the pickle, as torch.save does."""

    def write(path):
        torch.save({"weight": Bomb(marker)}, path)
        return path

    return write


@pytest.fixture
def folder(tiny_teacher, tmp_path):
    return shutil.copytree(tiny_teacher, tmp_path / "teacher")


def test_the_bomb_works(tmp_path):
    """Otherwise the tests here would show nothing."""
    torch.save({"weight": Bomb(tmp_path / "a")}, tmp_path / "a.bin")
    torch.load(tmp_path / "a.bin", weights_only=False)
    assert (tmp_path / "a").is_dir()


@pytest.mark.parametrize("part", NETWORKS)
@pytest.mark.parametrize("command", ["train", "sample", "evaluate"])
def test_weights_as_a_pickle(capsys, bomb, folder, write_config, tmp_path, part, command):
    weights, = (folder / part).glob("*.safetensors")
    bomb(weights.with_name({"text_encoder": "pytorch_model.bin"}.get(part, f"{NETWORKS[part]}.bin")))
    weights.unlink()
    line = fails(capsys, *run(command, folder, write_config, tmp_path))
    assert "pickle" in line and ".save_pretrained(" in line and part in line, line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("part", NETWORKS)
@pytest.mark.parametrize("command", ["train", "sample"])
def test_a_pickle_called_safetensors(capsys, bomb, folder, write_config, tmp_path, part, command):
    bomb(next((folder / part).glob("*.safetensors")))
    assert "cannot be loaded" in fails(capsys, *run(command, folder, write_config, tmp_path))


@pytest.mark.parametrize("part", NETWORKS)
@pytest.mark.parametrize("command", ["train", "sample"])
def test_an_index_that_names_a_pickle(capsys, bomb, folder, write_config, tmp_path, part, command):
    """Sharded weights are found through a JSON index; it may name anything."""
    weights, = (folder / part).glob("*.safetensors")
    weights.rename(weights.with_name("unused.safetensors"))
    shard = bomb(folder / part / f"{NETWORKS[part]}.bin")
    index = {"metadata": {"total_size": 1}, "weight_map": {"conv_in.weight": shard.name}}
    (folder / part / f"{NETWORKS[part]}.safetensors.index.json").write_text(json.dumps(index))
    assert "cannot be loaded" in fails(capsys, *run(command, folder, write_config, tmp_path))


def test_pickles_beside_safetensors_are_left_alone(bomb, folder, tmp_path):
    for part, name in NETWORKS.items():
        bomb(folder / part / f"{name}.bin")
        bomb(folder / part / "pytorch_model.bin")
    args = ["sample", "--model", folder, "--prompt", "x", "--steps", "1", "--out", tmp_path / "x.png"]
    assert cli.main([str(a) for a in args]) == 0


@pytest.mark.parametrize("change", [
    lambda index: index.update(_class_name=["pipeline", "Evil"]),
    lambda index: index.update(_class_name=["evil", "OneStepPipeline"]),
    lambda index: index.update(unet=["evil", "Evil"]),
    lambda index: index.update(scheduler=["scheduler/evil", "Evil"]),
    lambda index: index.update(unet=["antigravity", "Evil"]),
], ids=["pipeline", "other-file", "unet", "path", "python-module"])
@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_code_of_the_folder(capsys, marker, folder, write_config, tmp_path, change, command):
    plant_code(folder, marker)
    edit(folder / "model_index.json", change)
    line = fails(capsys, *run(command, folder, write_config, tmp_path))
    assert "code of" in line and str(folder) in line, line


def test_our_exports_run_our_code(marker, folder, tmp_path):
    """An export names a class of its own pipeline.py; sidfast runs the class it has itself."""
    plant_code(folder, marker)
    edit(folder / "model_index.json",
         lambda index: index.update(_class_name=["pipeline", "OneStepPipeline"], t_init=625))
    args = ["sample", "--model", folder, "--prompt", "x", "--out", tmp_path / "x.png"]
    assert cli.main([str(a) for a in args]) == 0


@pytest.mark.parametrize("t_init", [None, "625", -1, 1000, [1], True], ids=str)
def test_an_export_whose_starting_timestep_is_wrong(capsys, folder, write_config, tmp_path, t_init):
    edit(folder / "model_index.json",
         lambda index: index.update(_class_name=["pipeline", "OneStepPipeline"], t_init=t_init))
    assert "t_init" in fails(capsys, *run("sample", folder, write_config, tmp_path))


def test_code_of_a_tokenizer(marker, folder, write_config, tmp_path, monkeypatch, capsys):
    """Transformers would ask at the terminal; sidfast says no."""
    plant_code(folder, marker)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    edit(folder / "tokenizer" / "tokenizer_config.json",
         lambda c: c.update(tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", None]}))
    for command in ("train", "sample"):
        main, *args = run(command, folder, write_config, tmp_path)
        code = main([str(a) for a in args] + (["--set", "train.steps=1"] if command == "train" else []))
        assert code in (0, 2), capsys.readouterr().err


@pytest.mark.parametrize("name, words", [("pytorch_model.bin", "pickle"), ("model.safetensors", "cannot be loaded")])
def test_clip(capsys, bomb, tiny_teacher, tmp_path, name, words):
    clip = shutil.copytree(CLIP, tmp_path / "clip")
    (clip / "model.safetensors").unlink()
    bomb(clip / name)
    line = fails(capsys, *evaluate(tiny_teacher, tmp_path, "clip", "--clip", clip))
    assert words in line and str(clip) in line


def test_inception_weights(capsys, bomb, tiny_teacher, tmp_path):
    file = bomb(tmp_path / "inception.pth")
    line = fails(capsys, *evaluate(tiny_teacher, tmp_path, "fid", "--features", f"inception:{file}"))
    assert "inception.pth" in line


def test_reference_statistics(capsys, marker, tiny_teacher, tmp_path):
    file = tmp_path / "reference.npz"
    np.savez(file, mu=np.array([Bomb(marker)], dtype=object), sigma=np.array([Bomb(marker)], dtype=object))
    for path in (file, file.with_suffix(".npy")):
        if path.suffix == ".npy":
            path.write_bytes(pickle.dumps(Bomb(marker)))
        args = "fid", "--features", f"clip:{CLIP}", "--reference", path
        line = fails(capsys, *evaluate(tiny_teacher, tmp_path, *args))
        assert path.name in line


def test_checker(capsys, bomb, tiny_teacher, tmp_path):
    assets = shutil.copytree(ROOT / "assets", tmp_path / "assets", ignore=shutil.ignore_patterns("teacher"))
    bomb(next((assets / "checker").glob("*.safetensors")))
    command = evaluate(tiny_teacher, tmp_path, "accuracy", "--assets", assets, "--images", "2")
    command[command.index("--prompts") + 1] = "shapes:held_out"
    assert "checker" in fails(capsys, *command)


def test_checkpoint(bomb, tmp_path):
    file = tmp_path / "generator.weights-00000-of-00001.safetensors"
    bomb(file)
    (tmp_path / "state.json").write_text(seal({"files": {file.name: {}}}))
    with pytest.raises(UserError, match="is no safetensors file"):
        read_tensors(tmp_path, "generator", "weights")


@pytest.mark.parametrize("name", ["../x/generator.weights-00000-of-00001.safetensors", "/etc/passwd", "generator.py",
                                  "generator.we/ghts-00000-of-00001.safetensors", "a.ema-00000-of-00001.safetensors"])
def test_checkpoint_with_files_from_elsewhere(tmp_path, name):
    """Its state.json is not damaged, and lists what no checkpoint has."""
    tensors = {"a": torch.ones(2)}
    folder = write_checkpoint(tmp_path / "checkpoints", 4, tensors)
    assert checkpoint_fault(folder) is None and torch.equal(read_tensors(folder, "generator", "ema")["a"], tensors["a"])
    state = read_state(folder)
    state["files"][name] = next(iter(state["files"].values()))
    (folder / "state.json").write_text(seal(state | {"digest": ""}))
    assert "is no file of a checkpoint" in checkpoint_fault(folder)


def test_checkpoint_with_a_file_that_it_does_not_list(tmp_path):
    """Its checksum is nowhere, so it is not read."""
    folder = write_checkpoint(tmp_path / "checkpoints", 4, {"a": torch.ones(2)})
    save_file({"a": torch.zeros(2)}, folder / "generator.ema-00001-of-00002.safetensors")
    save_file({"a": torch.zeros(2)}, folder / "fake_score.exp_avg-00000-of-00001.safetensors")
    assert checkpoint_fault(folder) is None and content_fault(folder) is None
    assert torch.equal(read_tensors(folder, "generator", "ema")["a"], torch.ones(2))
    assert read_tensors(folder, "fake_score", "exp_avg") == {}


def run(command, folder, write_config, tmp_path):
    """[main, *arguments] of a command on a model."""
    if command == "train":
        return [train.main, "--config", write_config(**{"model.teacher": str(folder)}), "--out", tmp_path / "run"]
    if command == "sample":
        return [cli.main, "sample", "--model", folder, "--prompt", "x", "--steps", "1", "--out", tmp_path / "x.png"]
    return evaluate(folder, tmp_path, "fid", "--features", f"clip:{CLIP}", "--reference", statistics(tmp_path))


def evaluate(model, tmp_path, metrics, *args):
    (tmp_path / "prompts.txt").write_text("a cat\n" * 400)
    return [cli.main, "evaluate", "--model", model, "--prompts", tmp_path / "prompts.txt", "--metrics", metrics,
            "--out", tmp_path / "result.json", *args]


def statistics(tmp_path):
    np.savez(tmp_path / "reference.npz", mu=np.zeros(128), sigma=np.eye(128))
    return tmp_path / "reference.npz"


def plant_code(folder, marker):
    for place in (folder, *(p for p in folder.iterdir() if p.is_dir())):
        for name in ("pipeline", "evil"):
            (place / f"{name}.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n\nclass Evil:\n    pass\n\n\n"
                                              "class OneStepPipeline:\n    pass\n")


def edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
