"""What an export or a resumed run is of: a teacher, prompts or checkpoint of something else is refused in one line, and
one that was only moved is accepted."""

import json
import shutil

import pytest
import torch
from conftest import process_alone
from helpers_checkpoint import write_checkpoint
from helpers_input import edit, fails
from safetensors.torch import load_file, save_file

from sidfast import cli, train
from sidfast.checkpoints.format import read_state
from sidfast.common.errors import UserError
from sidfast.common.files import drop_lock, take_lock
from sidfast.config.schema import load_config
from sidfast.publishing.export import read_distillation
from sidfast.runs.directory import open_run
from sidfast.runs.identity import check_inputs, check_origin, describe_inputs, describe_run, locate_inputs
from sidfast.teachers.fingerprint import PARTS, TEACHER, describe_teacher, teacher_change
from sidfast.teachers.load import load_teacher


@pytest.fixture
def begun(write_config, tiny_teacher, tmp_path, monkeypatch):
    """(configuration file, run directory) of a run that was started in tmp_path with relative names."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_teacher, "assets/teacher")
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    path = write_config(**{"model.teacher": "assets/teacher", "data.prompts": "prompts.txt", "train.steps": 9})
    config, run = load_config(path), tmp_path / "run"
    teacher = load_teacher("assets/teacher")
    inputs = describe_inputs(config, teacher)
    (run / "export").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({
        "config": config.model_dump(), "paths": locate_inputs(config), "inputs": inputs}))
    weights = {name: value + 0.01 for name, value in teacher.network.state_dict().items()}
    write_checkpoint(run / "checkpoints", 3, weights, run=describe_run(config, inputs))
    return path, run


def tensors(name, change):
    """change(folder): a weights file there, {name: tensor} changed in place."""

    def apply(folder):
        values = load_file(folder / name)
        change(values)
        save_file(values, folder / name, {"format": "pt"})

    return apply


def halve(values):
    for value in values.values():
        value *= 0.5


def nudge_the_last(values):
    values["up_blocks.0.resnets.1.conv2.weight"].view(-1)[-1] += 1e-3


def swap_words(folder):
    path = folder / "tokenizer" / "tokenizer.json"
    text = path.read_text()
    for old, new in (("red", "X"), ("blue", "red"), ("X", "blue")):
        text = text.replace(f'"{old}</w>"', f'"{new}</w>"')
    path.write_text(text)


@pytest.fixture(scope="module")
def fingerprints(tiny_teacher):
    return describe_teacher(load_teacher(str(tiny_teacher)))


@pytest.mark.parametrize("change, part", [
    (tensors("vae/diffusion_pytorch_model.safetensors", halve), "VAE"),
    (tensors("unet/diffusion_pytorch_model.safetensors", nudge_the_last), "UNet"),
    (edit("vae/config.json", scaling_factor=0.5), "VAE"), (edit("unet/config.json", sample_size=16), "UNet"),
    (edit("scheduler/scheduler_config.json", prediction_type="v_prediction"), "scheduler"),
    (edit("scheduler/scheduler_config.json", timestep_spacing="trailing"), "scheduler"),
    (edit("text_encoder/config.json", hidden_act="gelu"), "text encoder"),
    (edit("tokenizer/tokenizer_config.json", model_max_length=12), "tokenizer"), (swap_words, "tokenizer"),
], ids=["vae", "one-value", "scaling", "side", "prediction", "spacing", "activation", "length", "vocabulary"])
def test_every_part_of_a_teacher_counts(tiny_teacher, fingerprints, tmp_path, change, part):
    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    change(folder)
    assert teacher_change(fingerprints, describe_teacher(load_teacher(str(folder)))) == f"its {part} differs"


def test_teacher_that_was_changed(begun, capsys, tmp_path):
    path, run = begun
    teacher = tmp_path / "assets" / "teacher"
    edit("vae/config.json", scaling_factor=0.5)(teacher)
    swap_words(teacher)
    words = "is not what it was when that run began (its VAE and tokenizer differ)"
    line = fails(capsys, cli.main, "export", "--run", run, "--out", tmp_path / "out")
    assert f"{teacher}, {words}" in line
    assert f"model.teacher {words}" in fails(capsys, train.main, "--config", path, "--out", run)
    line = fails(capsys, cli.main, "export", "--run", run, "--teacher", "assets/teacher", "--out", tmp_path / "out")
    assert f"--teacher assets/teacher: is not the teacher of {run} (its VAE and tokenizer differ)" in line
    assert not (tmp_path / "out").exists()


def test_run_of_an_older_version(begun, capsys, tmp_path):
    """Its config.json has one fingerprint of the teacher and no paths, its checkpoints say nothing of the run."""
    _, run = begun
    described = json.loads((run / "config.json").read_text())
    described["inputs"].pop(PARTS)
    described.pop("paths")
    (run / "config.json").write_text(json.dumps(described))
    shutil.rmtree(run / "checkpoints")
    weights = load_teacher("assets/teacher").network.state_dict()
    write_checkpoint(run / "checkpoints", 3, dict(weights))
    assert cli.main(["export", "--run", str(run), "--out", "out"]) == 0
    tensors("vae/diffusion_pytorch_model.safetensors", halve)(tmp_path / "assets" / "teacher")
    line = fails(capsys, cli.main, "export", "--run", run, "--out", tmp_path / "out")
    assert "is not what it was when that run began (its weights or noise levels differ)" in line


def test_fingerprints_stay_the_same(tiny_teacher, fingerprints, tmp_path):
    """For a teacher that was moved, and one whose files state the defaults as another version of the libraries does."""
    moved = shutil.copytree(tiny_teacher, tmp_path / "moved")
    for part in ("unet", "vae", "text_encoder"):
        file = moved / part / "config.json"
        values = json.loads(file.read_text())
        values |= {"_name_or_path": "/elsewhere", "_diffusers_version": "0.99", "transformers_version": "9"}
        for key in ("dropout", "norm_eps", "shift_factor", "attention_dropout"):
            values.pop(key, None)                        # (their defaults)
        file.write_text(json.dumps(values))
    assert describe_teacher(load_teacher(str(moved))) == fingerprints


@pytest.mark.parametrize("teacher", ["./assets/teacher", "assets/teacher/", "ABSOLUTE", "LINK", "MOVED"])
def test_names_of_the_same_teacher_and_prompts(begun, write_config, capsys, tmp_path, teacher):
    _, run = begun
    (tmp_path / "LINK").symlink_to(tmp_path / "assets" / "teacher")
    shutil.copytree(tmp_path / "assets" / "teacher", tmp_path / "MOVED")
    (tmp_path / "prompts.txt").rename("moved.txt")
    name = str(tmp_path / "assets" / "teacher") if teacher == "ABSOLUTE" else teacher
    config = load_config(write_config("moved.json", **{"model.teacher": name, "data.prompts": "moved.txt"}))
    open_run(run, config, "auto")
    inputs = describe_inputs(config, load_teacher(name))
    check_inputs(run, inputs)
    check_origin(run / "checkpoints" / "step-00000003", config, inputs, "")
    (tmp_path / "moved.txt").write_text("a blue circle\n")
    with pytest.raises(UserError, match=r"data\.prompts is not what it was when that run began"):
        check_inputs(run, describe_inputs(config, load_teacher(name)))


def test_prompts_of_another_kind_are_other_prompts(begun, write_config):
    _, run = begun
    config = load_config(write_config("shapes.json", **{"model.teacher": "assets/teacher"}))
    with pytest.raises(UserError, match=r"data\.prompts is 'prompts\.txt' there and 'shapes:train' here"):
        open_run(run, config, "auto")


def test_export_from_another_folder(begun, capsys, tmp_path, monkeypatch):
    _, run = begun
    (tmp_path / "elsewhere" / "assets" / "teacher").mkdir(parents=True)          # (of the same name, and not it)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cli.main(["export", "--run", str(run), "--out", str(tmp_path / "out")]) == 0
    (tmp_path / "assets").rename(tmp_path / "assets2")
    line = fails(capsys, cli.main, "export", "--run", run, "--out", tmp_path / "again")
    assert f"its teacher is not at {tmp_path}/assets/teacher any more" in line and "--teacher DIR" in line
    there = str(tmp_path / "assets2" / "teacher")
    assert cli.main(["export", "--run", str(run), "--teacher", there, "--out", str(tmp_path / "again")]) == 0
    assert read_distillation(tmp_path / "again")["inputs"] == describe_inputs_of(run)


def test_export_that_another_process_is_writing(begun, capsys, tmp_path):
    lock = take_lock(tmp_path / ".out.lock")
    line = fails(capsys, cli.main, "export", "--run", begun[1], "--out", tmp_path / "out")
    assert f"--out {tmp_path}/out: cannot be written (another process is writing an export to {tmp_path}/out)" in line
    drop_lock(lock)
    assert not (tmp_path / "out").exists()


def describe_inputs_of(run):
    return json.loads((run / "config.json").read_text())["inputs"]


OTHERS = {"settings": ({"guidance.kappa2": 4.5}, {}, "guidance.kappa2 is 4.5 there and 1.5 here"),
          "seed": ({"train.seed": 7}, {}, "train.seed is 7 there and 0 here"),
          "teacher": ({}, {PARTS: {"vae": "0"}}, "its VAE differs"),
          "old": ({}, {TEACHER: "0", PARTS: None}, "its weights or noise levels differ"),
          "prompts": ({}, {"data.prompts": "0"}, "data.prompts is not what")}


def checkpoint_of(begun, write_config, tmp_path, name, says):
    """One of another run, and the words by which it is refused; it says of which, or the config.json next to it."""
    _, run = begun
    changes, inputs, words = OTHERS[name]
    config = load_config(write_config("other.json", **{"model.teacher": "x", "data.prompts": "prompts.txt"} | changes))
    inputs, other = describe_inputs_of(run) | inputs, tmp_path / "other"
    folder = write_checkpoint(other / "checkpoints", 2, {"a": torch.ones(1)},
                              run=describe_run(config, inputs) if says else None)
    (other / "config.json").write_text("{}" if says else json.dumps({"config": config.model_dump(), "inputs": inputs}))
    return folder, words


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("says", [True, False], ids=["new", "before"])
def test_checkpoint_of_another_run(begun, write_config, tmp_path, name, says):
    path, run = begun
    folder, words = checkpoint_of(begun, write_config, tmp_path, name, says)
    with pytest.raises(UserError) as raised:
        check_origin(folder, load_config(path), describe_inputs_of(run), "")
    assert f"{folder} is of another run (" in str(raised.value) and words in str(raised.value)


def test_export_of_another_runs_checkpoint(begun, write_config, capsys, tmp_path):
    folder, words = checkpoint_of(begun, write_config, tmp_path, "settings", True)
    line = fails(capsys, cli.main, "export", "--run", begun[1], "--checkpoint", folder, "--out", tmp_path / "out")
    assert line.startswith(f"sidfast: --checkpoint {folder} is of another run (") and words in line
    assert not (tmp_path / "out").exists()


def test_free_settings_may_differ(begun, write_config, tmp_path):
    _, run = begun
    config = load_config(write_config("more.json", **{
        "model.teacher": "assets/teacher", "data.prompts": "prompts.txt", "train.steps": 99, "train.micro_batch": 4,
        "deepspeed": {"zero_optimization": {"stage": 2}}}))
    check_origin(run / "checkpoints" / "step-00000003", config, describe_inputs_of(run), "")


def test_training_does_not_resume_from_another_run(begun, capsys, tmp_path, monkeypatch):
    """A checkpoint that was put among the run's own; `--resume` may name one, as before."""
    path, run = begun
    process_alone(monkeypatch)
    other = load_config(path, ["guidance.kappa4=4.5"])
    weights = {name: value.abs() for name, value in load_teacher("assets/teacher").network.state_dict().items()}
    theirs = write_checkpoint(run / "checkpoints", 5, weights, run=describe_run(other, describe_inputs_of(run)))
    line = fails(capsys, train.main, "--config", path, "--out", run)
    assert f"{theirs} is of another run (guidance.kappa4 is 4.5 there and 1.5 here)" in line
    capsys.readouterr()
    arguments = ["--config", path, "--out", tmp_path / "new", "--resume", theirs, "--set", "train.steps=6", "--set",
                 "train.save_every=6"]
    assert train.main([str(a) for a in arguments]) == 0
    mine = read_state(tmp_path / "new" / "checkpoints" / "step-00000006")["run"]
    assert mine == json.loads(json.dumps(describe_run(load_config(path), describe_inputs_of(run))))
    described = json.loads((tmp_path / "new" / "config.json").read_text())
    assert described["paths"] == {"model.teacher": str(tmp_path / "assets" / "teacher"),
                                  "data.prompts": str(tmp_path / "prompts.txt")}
    assert read_distillation(tmp_path / "new" / "export")["inputs"] == describe_inputs_of(run)


def test_demo_shows_the_teacher_of_the_model_alone(begun, capsys, tmp_path, monkeypatch):
    from sidfast.publishing.demo import open_models

    _, run = begun
    shutil.rmtree(run / "export")
    assert cli.main(["export", "--run", str(run), "--out", str(run / "export")]) == 0
    monkeypatch.chdir(tmp_path.parent)
    assert open_models(str(run), None, torch.device("cpu"))[1].name == str(tmp_path / "assets" / "teacher")
    edit("vae/config.json", scaling_factor=0.5)(tmp_path / "assets" / "teacher")
    with pytest.raises(UserError, match=r"is not what it was distilled from \(its VAE differs\); name the"):
        open_models(str(run), None, torch.device("cpu"))


def test_study_whose_teacher_was_changed_between_its_runs(group, tiny_config, fingerprints, tmp_path):
    """One run is done, of another teacher of that name: a table of both would not say so."""
    from sidfast.studies.study import read_study
    from sidfast.studies.worker import Worker

    (tmp_path / "base.json").write_text(json.dumps(tiny_config))
    (tmp_path / "study.json").write_text(json.dumps({
        "question": "?", "base": "base.json", "images": 8, "seeds": [0, 1], "variants": {"base": {}},
        "evaluation": {"images": 130, "points": 1, "samples": 2}}))
    study = read_study(tmp_path / "study.json")
    done = tmp_path / "out" / study.runs[0].folder
    done.mkdir(parents=True)
    inputs = {TEACHER: "0", PARTS: fingerprints[PARTS] | {"vae": "0"}}
    (done / "config.json").write_text(json.dumps({"config": study.runs[0].config.model_dump(), "inputs": inputs}))
    with pytest.raises(UserError, match=rf"--out {done}: model\.teacher is not what .* \(its VAE differs\)"):
        Worker(study, tmp_path / "out", 1, torch.device("cpu"))._train(study.runs[1])
