"""Captions and crops of COCO-2014 val, from a small folder of the official layout."""

import json

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from sidfast import cli
from sidfast.data.prompts import read_prompts
from sidfast.evaluation.coco import prepare_coco

SIZES = {42: (640, 480), 7: (300, 500), 1234: (256, 256), 99: (200, 100)}


@pytest.fixture
def coco(tmp_path):
    """Four images, two captions each, in the layout of cocodataset.org."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2014").mkdir()
    rng, images, annotations = np.random.default_rng(0), [], []
    for k, (key, (width, height)) in enumerate(SIZES.items()):
        name = f"COCO_val2014_{key:012d}.jpg"
        picture = np.zeros((height, width, 3), np.uint8)
        side = min(width, height)
        top, left = (height - side) // 2, (width - side) // 2
        picture[top:top + side, left:left + side] = rng.integers(60, 200, 3)     # the part that a centre crop keeps
        Image.fromarray(picture).save(tmp_path / "val2014" / name, quality=95)
        images.append({"id": key, "file_name": name, "width": width, "height": height})
        annotations.append({"id": 100 - k, "image_id": key, "caption": f"second of {key}"})
        annotations.append({"id": k, "image_id": key, "caption": f" first\nof {key} "})
    (tmp_path / "annotations" / "captions_val2014.json").write_text(
        json.dumps({"images": images, "annotations": annotations}))
    return tmp_path


def test_captions_and_crops(coco):
    captions, crops = prepare_coco(coco)
    lines = captions.read_text().splitlines()
    assert sorted(lines) == sorted(f"first of {key}" for key in SIZES)
    assert lines != [f"first of {key}" for key in sorted(SIZES)]             # a fixed shuffle
    assert {p.name for p in crops.iterdir()} == {f"COCO_val2014_{key:012d}.png" for key in SIZES}
    for path in crops.iterdir():
        pixels = np.asarray(Image.open(path)).astype(int)
        assert pixels.shape == (256, 256, 3) and pixels[4:-4, 4:-4].std((0, 1)).max() < 2      # the centre, whole
    before = {p: p.stat().st_mtime_ns for p in crops.iterdir()}
    prepare_coco(coco)
    assert {p: p.stat().st_mtime_ns for p in crops.iterdir()} == before


def test_captions_without_a_visible_character(coco):
    """They are none, so lines and images stay as many; the file may begin with a byte order mark."""
    path = coco / "annotations" / "captions_val2014.json"
    content = json.loads(path.read_text())
    for entry in content["annotations"]:
        if entry["caption"].strip() == "first\nof 7":
            entry["caption"] = "\u200b \ufeff"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(content).encode())
    captions, _ = prepare_coco(coco)
    assert sorted(read_prompts(captions)) == sorted(
        "second of 7" if key == 7 else f"first of {key}" for key in SIZES)


def test_the_protocol_in_one_command(coco, tiny_teacher):
    """Random captions, so the numbers mean nothing; what is fixed by the protocol is in the result."""
    out = coco / "r.json"
    args = ["evaluate", "--coco", coco, "--model", tiny_teacher, "--steps", "1", "--features",
            f"clip:{ROOT / 'assets/clip'}", "--clip", ROOT / "assets/clip", "--metrics", "kid,clip", "--cache",
            coco / "cache", "--out", out]
    assert cli.main([str(a) for a in args]) == 0
    result = json.loads(out.read_text())
    assert result["images"] == 4 and result["reference"]["images"] == 4
    assert result["resampling"] == {"side": 256, "filter": "bicubic, antialiased"}
    assert result["seeds"] == {"first": 0, "last": 3, "per_prompt": 1}


@pytest.mark.parametrize("damage, words", [
    (lambda f: (f / "sidfast").write_text("x"), "cannot be written"),
    (lambda f: (f / "annotations/captions_val2014.json").unlink(), "captions_val2014.json is missing"),
    (lambda f: (f / "annotations/captions_val2014.json").write_text("[1]"), "not COCO's file"),
    (lambda f: next((f / "val2014").iterdir()).unlink(), "1 images of the annotations are missing"),
    (lambda f: next((f / "val2014").iterdir()).write_bytes(b"x"), "broken"),
], ids=["not-writable", "no-annotations", "other-json", "image-missing", "image-broken"])
def test_bad_folders(coco, capsys, damage, words):
    damage(coco)
    assert cli.main(["evaluate", "--coco", str(coco)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("sidfast: --coco") and words in error[-1]
    assert not (coco / "sidfast" / "captions.txt").exists()
