"""docs/adding-a-teacher.md names what a family says; its example is a family that trains, and agrees with diffusers."""

import importlib
import re
import shutil
import sys

import pytest
import torch
from conftest import ROOT, process_alone
from diffusers import StableDiffusionPipeline
from helpers_input import edit

from sidfast import train
from sidfast.teachers import families
from sidfast.teachers.base import Family
from sidfast.teachers.load import load_meta_teacher, load_teacher

PAGE = (ROOT / "docs" / "adding-a-teacher.md").read_text(encoding="utf-8")


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The page's example as a module, its class put where its last lines say."""
    file, listed = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "trigger_family.py").write_text(file)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("trigger_family")
    names = vars(families) | vars(module)
    exec(listed, names)
    monkeypatch.setattr(families, "FAMILIES", names["FAMILIES"])
    yield module
    sys.modules.pop("trigger_family")


@pytest.fixture
def folder(tmp_path, tiny_teacher):
    """A teacher of the example's kind."""
    folder = tmp_path / "teacher"
    shutil.copytree(tiny_teacher, folder)
    edit("model_index.json", trigger="mdjrny-v4 style")(folder)
    return folder


def test_the_page_names_what_a_family_says():
    table = PAGE[PAGE.index("| member |"):PAGE.index("`Conditions` are")]
    told = set(re.findall(r"`(\w+)`", " ".join(row.split("|")[1] for row in table.splitlines() if row)))
    says = {name for name in (*vars(Family), *Family.__annotations__) if not name.startswith("_")}
    assert told == says - {"class_of"}                   # (which follows from `networks`)


def test_the_example_is_a_family(example, folder):
    """Training, the teacher's pipeline and the export's take texts as diffusers does those with the trigger word."""
    teacher, size = load_teacher(folder), (16, 16)
    assert teacher.family.name == "Stable Diffusion with a trigger word"
    plain = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    plain.set_progress_bar_config(disable=True)
    with torch.no_grad():
        want, null = plain.encode_prompt(["mdjrny-v4 style a red circle"], "cpu", 1, True)
        cond = teacher.encode(teacher.tokenize(["a red circle"]), size)["encoder_hidden_states"]
        exported = teacher.one_step_pipeline(teacher.network, 625).encode_prompt(["a red circle"])[0]
        uncond = teacher.family.encode_empty(teacher, size)["encoder_hidden_states"]
    assert torch.equal(cond, want) and torch.equal(exported, want) and torch.equal(uncond, null)
    options = {"num_inference_steps": 2, "output_type": "latent"}
    ours, theirs = (pipe(text, generator=torch.Generator().manual_seed(0), **options).images for pipe, text in (
        (teacher.pipeline(), "a red circle"), (plain, "mdjrny-v4 style a red circle")))
    assert torch.equal(ours, theirs)


def test_the_example_trains(example, folder, monkeypatch, write_config, tmp_path):
    """Training, `plan`'s shapes, and an export that brings the example's own pipeline."""
    process_alone(monkeypatch)
    config = write_config(**{"model.teacher": str(folder), "train.steps": 2, "train.save_every": 2})
    assert train.main(["--config", str(config), "--out", str(tmp_path / "run")]) == 0
    assert "class OneStepTriggerPipeline" in (tmp_path / "run" / "export" / "pipeline.py").read_text()
    assert load_meta_teacher(folder).conditions(1)["encoder_hidden_states"].shape[-1] == 16


def test_without_its_line_it_is_another_family(folder):
    assert load_teacher(folder).family.name == "Stable Diffusion 1.x and 2.x"
