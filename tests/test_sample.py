"""`sidfast sample`: pictures, and folders of images whose prompts are found again."""

import json

import numpy as np
import pytest
import torch
from helpers_input import fails
from PIL import Image

from sidfast import cli
from sidfast.evaluation.images import ImageFolder
from sidfast.publishing.export import write_export
from sidfast.publishing.load import load_pipeline
from sidfast.teachers.load import load_teacher

PROMPTS = ["A red-ish  CAFÉ, 42 cats / ../x", "猫の絵", "...", "one " * 60]
NAMES = ["a-red-ish-café-42-cats-x", "猫の絵", "", "-".join(["one"] * 20)]


@pytest.fixture(scope="module")
def export(tiny_teacher, tmp_path_factory):
    teacher, folder = load_teacher(str(tiny_teacher)), tmp_path_factory.mktemp("sample") / "export"
    write_export(teacher.one_step_pipeline(teacher.network, 500), folder, torch.float32)
    return folder


def sample(model, prompts, *arguments):
    return cli.main(["sample", "--model", str(model), "--prompts", str(prompts), *map(str, arguments)])


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return tmp_path / "prompts.txt"


def test_folder(export, prompts, tmp_path, capsys):
    """An image a file, in the order of the prompts, which `evaluate` reads; the bits of the pipeline."""
    out = tmp_path / "new" / "images"
    assert sample(export, prompts, "-n", 2, "--seed", 7, "--out", out, "--device", "cpu") == 0
    assert capsys.readouterr().out == f"{out}: 8 images of 16 x 16; images.jsonl has their prompts and seeds\n"
    listed = [json.loads(line) for line in (out / "images.jsonl").read_text().splitlines()]
    assert listed == [{"file": "-".join(filter(None, [f"{2 * i + k:05d}", name])) + ".png", "prompt": text.strip(),
                       "seed": 7 + k} for i, (text, name) in enumerate(zip(PROMPTS, NAMES, strict=True))
                      for k in range(2)]
    assert {path.name for path in out.iterdir()} == {"images.jsonl", *(row["file"] for row in listed)}
    images, pipe = ImageFolder(out, "--model"), load_pipeline(export, "cpu")[0]
    images.check_numbers(8)
    assert [path.name for path in images.files] == [row["file"] for row in listed]
    for row in listed:
        want = pipe(row["prompt"], generator=torch.Generator().manual_seed(row["seed"])).images[0]
        assert np.array_equal(np.array(Image.open(out / row["file"])), np.array(want))
    line = fails(capsys, cli.main, "sample", "--model", export, "--prompt", "x", "--out", out)
    assert f"--out {out}: the folder is not empty" in line and len(list(out.iterdir())) == 9


def test_size_type_and_format(export, prompts, tmp_path, capsys):
    for ending, dtype in (("png", "fp32"), ("jpg", "fp32"), ("png", "bf16")):
        out = tmp_path / f"{ending}-{dtype}"
        assert sample(export, prompts, "--height", 24, "--width", 20, "--format", ending, "--dtype", dtype, "--out",
                      out) == 0
        assert "4 images of 20 x 24" in capsys.readouterr().out
    png, jpg, low = (next(path for path in sorted((tmp_path / name).iterdir()) if path.suffix != ".jsonl")
                     for name in ("png-fp32", "jpg-fp32", "png-bf16"))
    png, jpg, low = (Image.open(path) for path in (png, jpg, low))
    assert (png.format, jpg.format, png.size) == ("PNG", "JPEG", (20, 24))
    differ = [np.abs(np.array(other, int) - np.array(png, int)) for other in (jpg, low)]
    assert 0 < differ[0].mean() < 6 and 0 < differ[1].max() < 40
    line = fails(capsys, cli.main, "sample", "--model", export, "--prompt", "x", "--out", "x.png", "--height", 21)
    assert line == "sidfast: --height 21: must be a multiple of 2, at most 16384"


def test_picture_as_jpeg(export, prompts, tmp_path, capsys):
    for name in ("grid.png", "grid.jpg"):
        assert sample(export, prompts, "-n", 2, "--out", tmp_path / name) == 0
        assert capsys.readouterr().out == f"{tmp_path / name}: 4 x 2 images of 16 x 16\n"
    png, jpg = (Image.open(tmp_path / name) for name in ("grid.png", "grid.jpg"))
    assert jpg.format == "JPEG" and jpg.size == png.size
    assert np.abs(np.array(jpg, int) - np.array(png, int)).mean() < 4
    prompts.write_text("x\n" * 700)
    line = fails(capsys, cli.main, "sample", "--model", export, "--prompts", prompts, "--width", 100, "--out",
                 tmp_path / "wide.jpg")
    assert "700 columns are too wide for a JPEG" in line and not (tmp_path / "wide.jpg").exists()


def test_a_model_that_makes_nothing_leaves_nothing(export, tiny_teacher, tmp_path, capsys):
    teacher = load_teacher(str(tiny_teacher))
    teacher.parts["vae"].post_quant_conv.bias += 3e38
    write_export(teacher.one_step_pipeline(teacher.network, 500), tmp_path / "broken", torch.float32)
    line = fails(capsys, cli.main, "sample", "--model", tmp_path / "broken", "--prompt", "x", "--out", tmp_path / "out")
    assert "non-finite pixels" in line and not (tmp_path / "out").exists()
