"""Images that are not square: in training, its grids and measures, exports, and the plan."""

import json
import shutil

import pytest
from conftest import ROOT, process_alone
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from helpers_input import edit

from sidfast import cli, train
from sidfast.common.errors import UserError
from sidfast.config.schema import load_config
from sidfast.planning.footprint import count_flops
from sidfast.planning.planner import Planner
from sidfast.publishing.grid import read_grid
from sidfast.teachers.load import load_meta_teacher, load_teacher

SIZE = (16, 24)                                          # height, width in pixels; latents 8 x 12


@pytest.fixture
def wide_teacher(tiny_teacher, tmp_path):
    """Its UNet says [height, width], as diffusers allows."""
    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    edit("unet/config.json", sample_size=[8, 12])(folder)
    return folder


def test_a_run(monkeypatch, write_config, tmp_path, capsys):
    process_alone(monkeypatch)
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    path = write_config(**{"model.resolution": list(SIZE), "train.steps": 1, "train.samples": 2, "train.save_every": 1,
                           "data.prompts": str(tmp_path / "prompts.txt"), "evaluation.images": 2,
                           "evaluation.prompts": str(tmp_path / "prompts.txt"), "evaluation.metrics": "clip",
                           "evaluation.clip": str(ROOT / "assets" / "clip")})
    out = tmp_path / "run"
    assert train.main(["--config", str(path), "--out", str(out)]) == 0, capsys.readouterr().err
    rows = read_grid(out / "samples" / "step-00000001.png")[1]
    assert {image.size[0] / image.size[1] for row in rows.values() for image in row} == {24 / 16}
    assert json.loads((out / "evaluation.json").read_text())["end"]["clip_score"] > -1
    config = load_config(path)
    planner = Planner(config, load_meta_teacher(config.model.teacher, **config.model.loading))
    assert planner.latent_shape == (4, 8, 12)
    assert planner.flops == count_flops(config, load_teacher(config.model.teacher), planner.latent_shape)
    for folder in (out / "export", tmp_path / "again"):
        if not folder.exists():
            assert cli.main(["export", "--run", str(out), "--out", str(folder)]) == 0
        assert UNet2DConditionModel.load_config(folder / "unet")["sample_size"] == [8, 12]
        pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
        assert pipe("x").images[0].size == SIZE[::-1] and pipe("x", height=8).images[0].size == (24, 8)


def test_a_teacher(wide_teacher):
    """Its own size is the default; a resolution of one number is square all the same."""
    for teacher in (load_teacher(wide_teacher), load_meta_teacher(str(wide_teacher))):
        assert teacher.image_size() == SIZE and teacher.latent_shape() == (4, 8, 12)
        assert teacher.latent_shape(16) == (4, 8, 8) and teacher.latent_shape([16, 8]) == (4, 8, 4)
    pipe = StableDiffusionPipeline.from_pretrained(wide_teacher, safety_checker=None)
    assert pipe("x", num_inference_steps=1).images[0].size == SIZE[::-1]


def test_flops_follow_the_area(write_config):
    def flops(resolution):
        config = load_config(write_config(), [f"model.resolution={resolution}"])
        return Planner(config, load_meta_teacher(config.model.teacher)).flops

    assert flops([16, 32]) == flops([32, 16]) > 1.9 * flops(16)


@pytest.mark.parametrize("value, words", [
    ("[16]", "list should have at least 2 items"), ("[16, 16, 16]", "list should have at most 2 items"),
    ("[16, 4]", "greater than or equal to 8, not 4"), ("[16, 20000]", "less than or equal to 16384, not 20000"),
    ("[16, 16.5]", "not 16.5"), ("4", "greater than or equal to 8, not 4"), ('"16x16"', "not '16x16'"),
    ("true", "not True")])
def test_what_is_no_size(write_config, value, words):
    with pytest.raises(UserError, match=rf"model\.resolution: .*{words}"):
        load_config(write_config(), [f"model.resolution={value}"])
