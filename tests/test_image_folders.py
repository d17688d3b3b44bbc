"""Folders of images: which files count, in which order, and that images and prompts belong together."""

import json
import os
import shutil

import numpy as np
import pytest
from conftest import ROOT
from helpers_input import fails
from PIL import Image

from sidfast import cli
from sidfast.common.errors import UserError
from sidfast.evaluation.images import ImageFolder
from sidfast.evaluation.reference import open_reference

CLIP = ROOT / "assets" / "clip"


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8))


def folder_of(path, *names):
    """A folder with an image under each name, all of them different."""
    for i, name in enumerate(names):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path / name, **({"format": "PNG"} if not name.lower().endswith(
            (".jpg", ".gif", ".tiff", ".webp", ".bmp")) else {}))
    return path


def refused(path, option="--model", nested=False):
    with pytest.raises(UserError) as caught:
        ImageFolder(path, option, nested=nested)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize("names", [
    ["0.png", "1.png", "2.png", "10.png"], ["9\u00b2.png", "10\u00b2.png"],
    ["7\u00b98.png", "7\u00b910.png", "\u09672.png"],
    ["x2y10.png", "x10y2.png"], ["01.png", "1.png", "2.png"], ["0.GIF", "1.PNG", "2.tiff", "3.webp", "4.bmp", "5.jfif"],
    ["1.5.png", "1.10.png"], ["\u0661.png", "\u0662.png"]], ids=ascii)
def test_natural_order(tmp_path, names):
    """Any digit in a name, and names that are equal but for zeros, in one order wherever the folder lies."""
    folder = folder_of(tmp_path / "f", *names)
    assert [path.name for path in ImageFolder(folder, "--model").files] == names
    again = tmp_path / "again"
    again.mkdir()
    for name in names[::-1]:
        shutil.copy(folder / name, again / name)
    assert ImageFolder(again, "--model").sha256() == ImageFolder(folder, "--model").sha256()


def test_formats_of_one_frame(tmp_path):
    """GIF and TIFF give the pixels that Pillow reads."""
    palette = picture(3).quantize(32)
    palette.save(folder_of(tmp_path, "0.tiff") / "1.gif")
    images = ImageFolder(tmp_path, "--model")(0, 2)
    for image, original in zip(images, (picture(0), palette.convert("RGB")), strict=True):
        assert np.array_equal((image * 255).round().byte().permute(1, 2, 0).numpy(), np.asarray(original))


@pytest.mark.parametrize("name, options", [
    ("1.gif", {"save_all": True}), ("1.webp", {"save_all": True}), ("1.tiff", {"save_all": True}),
    ("1.png", {"save_all": True})])
def test_several_frames_in_one_file(tmp_path, name, options):
    frames = [picture(i) for i in range(3)]
    frames[0].save(folder_of(tmp_path, "0.png") / name, append_images=frames[1:], **options)
    assert refused(tmp_path) == f"--model {tmp_path}: {name} has 3 frames; one image is needed"


@pytest.mark.parametrize("name", ["1.heic", "1.AVIF", "1.jp2", "1.svg", "1.tga", "1.psd"])
def test_formats_that_are_not_read(tmp_path, name):
    (folder_of(tmp_path, "0.png", "2.png") / name).write_bytes(b"x")
    assert refused(tmp_path).startswith(f"--model {tmp_path}: {name}: not a format that is read; convert to one of ")
    assert name in refused(tmp_path, "--reference", nested=True)


def test_files_that_are_no_images_are_named(tmp_path):
    told = []
    folder = folder_of(tmp_path, "0.png", "1.png", ".hidden.png", "grids/0.png")
    for name in ("config.json", "captions.txt", ".DS_Store", "Thumbs.db"):
        (folder / name).write_text("{}")
    images = ImageFolder(folder, "--model", told.append)
    assert [path.name for path in images.files] == ["0.png", "1.png"]
    names = "Thumbs.db, captions.txt, config.json, grids"
    assert told == [f"--model {folder}: {names} left out, not images of this folder"]
    told.clear()
    for path in ("config.json", "captions.txt", "Thumbs.db"):
        (folder / path).unlink()
    shutil.rmtree(folder / "grids")
    ImageFolder(folder, "--model", told.append)
    assert told == []


def test_names_that_are_not_utf8(tmp_path):
    folder = folder_of(tmp_path / "f", "0.png", "1.png")
    before = ImageFolder(folder, "--model").sha256()
    os.rename(folder / "1.png", os.fsencode(folder) + b"/1\xe9.png")
    images = ImageFolder(folder, "--model")
    assert len(images) == 2 and images.sha256() != before and images(0, 2).shape == (2, 3, 8, 8)


def test_what_stands_for_an_image(tmp_path):
    """A link to nothing is a missing image; a folder by the name of one is a folder."""
    (folder_of(tmp_path, "0.png", "2.png") / "1.png").symlink_to("nowhere.png")
    assert "1.png is no image or a broken one (" in refused(tmp_path)
    (tmp_path / "1.png").unlink()
    (tmp_path / "1.png").mkdir()
    assert len(ImageFolder(tmp_path, "--model")) == 2


def test_subfolders(tmp_path):
    """Of a reference they are read, for the order does not matter; a model's images must be in one folder."""
    folder = folder_of(tmp_path / "f", "b/2.png", "b/10.png", "a/c/1.png", "a/.cache/1.png", "0/1.png")
    (folder / "a" / "list.txt").write_text("x")
    (tmp_path / "elsewhere").mkdir()
    picture(9).save(tmp_path / "elsewhere" / "5.png")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "a" / "loop").symlink_to(folder)
    told = []
    reference, images = open_reference(folder, told.append)
    names = ["0/1.png", "a/c/1.png", "b/2.png", "b/10.png", "linked/5.png"]
    assert [str(path.relative_to(folder)) for path in images.files] == names and reference.images == 5
    assert told == [f"--reference {folder}: a/list.txt left out, not images of this folder"]
    assert refused(folder) == (f"--model {folder}: its images are in subfolders (0, a, b, linked); put them into one "
                               "folder, in the order of the prompts")
    before = reference.sha256
    os.rename(folder / "b" / "10.png", folder / "b" / "11.png")
    assert open_reference(folder)[0].sha256 != before
    folder_of(folder, "top.png")                         # as ever: those of the folder itself, if it has any
    assert [path.name for path in open_reference(folder)[1].files] == ["top.png"]


@pytest.mark.parametrize("names, n, at", [
    (["0.png", "1.png", "3.png"], 3, "3.png"), (["1.png", "2.png", "4.png"], 3, "4.png"),
    (["00000.png", "00002.png"], 2, "00002.png"), (["img_1.png", "img_2.png", "img_5.jpg"], 3, "img_5.jpg"),
    (["1.png", "01.png", "2.png"], 3, "1.png"), (["0.png", "1.jpg", "1.png"], 3, "1.png"),
    (["0.png", "1.png", "3.png"], 2, None), (["0.png", "1.png", "2.png"], 3, None), (["5.png", "6.png"], 2, None),
    (["139.png", "285.png", "632.png"], 3, None), (["a0.png", "b2.png"], 2, None), (["cat.png", "dog1.png"], 2, None),
    (["0_0.png", "0_1.png", "1_0.png", "1_1.png"], 4, None), (["0.png"], 1, None)], ids=str)
def test_gaps_in_numbers(tmp_path, names, n, at):
    """Only where names count from 0 or 1: other numbers are those of a data set."""
    images = ImageFolder(folder_of(tmp_path, *names), "--model")
    if at is None:
        images.check_numbers(n)
        return
    with pytest.raises(UserError, match=f"--model .*: {at} is where number . should be"):
        images.check_numbers(n)


@pytest.fixture
def evaluate(tmp_path, capsys):
    """evaluate(folder, prompts, *args): the result, or the line of an evaluation that must fail; and what was said."""
    def run(folder, prompts, *args, works=True):
        (tmp_path / "p.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
        out = tmp_path / "r.json"
        words = ["evaluate", "--model", folder, "--prompts", tmp_path / "p.txt", "--metrics", "clip", "--clip", CLIP,
                 "--out", out, *args]
        if not works:
            return fails(capsys, cli.main, *words)
        assert cli.main(list(map(str, words))) == 0
        return json.loads(out.read_text()), capsys.readouterr().err

    return run


def test_as_many_images_as_prompts(tmp_path, evaluate):
    folder = folder_of(tmp_path / "f", "0.png", "1.png", "2.png", "3.png")
    prompts = ["a red circle", "a blue square", "a green cross", "a pink star"]
    whole = evaluate(folder, prompts)[0]["metrics"]["clip_score"]
    for wrong in (prompts[:3], [*prompts, "one more"]):
        line = evaluate(folder, wrong, works=False)
        assert f"the folder has 4 images, {tmp_path}/p.txt has {len(wrong)} prompts; the numbers must be" in line
    assert "with 2 images each" in evaluate(folder, prompts, "--seeds-per-prompt", 2, works=False)
    assert evaluate(folder, prompts[:2], "--seeds-per-prompt", 2)[0]["images"] == 4
    assert evaluate(folder, [*prompts, "one more"], "--images", "4")[0]["metrics"]["clip_score"] == whole
    (folder / "2.png").unlink()
    assert "the folder has 3 images" in evaluate(folder, prompts, works=False)
    assert "3.png is where number 2 should be" in evaluate(folder, prompts[:3], works=False)
    assert evaluate(folder, prompts, "--images", 2)[0]["images"] == 2


def test_images_next_to_another_program_s_files(tmp_path, evaluate):
    folder = folder_of(tmp_path / "f", "0.png", "1.png")
    (folder / "config.json").write_text('{"steps": 4}')
    result, said = evaluate(folder, ["a red circle", "a blue square"])
    assert result["model"]["files"] == 2 and f"--model {folder}: config.json left out" in said


def test_prompts_that_are_cut_off_are_counted(tmp_path, evaluate, tiny_teacher):
    long = "a small red circle above a large blue square " * 4
    folder = folder_of(tmp_path / "f", "0.png", "1.png", "2.png")
    result, said = evaluate(folder, [long, "a red circle", long])
    assert result["prompts"]["cut"] == {"clip": 2} and "2 of 3 prompts have more than the 24 tokens" in said
    result, said = evaluate(tiny_teacher, [long, "a red circle"], "--steps", "1", "--seeds-per-prompt", 2)
    assert result["prompts"]["cut"] == {"clip": 1, "model": 1}
    assert said.count("1 of 2 prompts have more than the 24 tokens") == 2
    result, said = evaluate(folder, ["a red circle"] * 3)
    assert result["prompts"]["cut"] == {"clip": 0} and "tokens" not in said
