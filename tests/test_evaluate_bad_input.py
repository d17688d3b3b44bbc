"""A user's mistake in `sidfast evaluate`: one clear line, exit code 2, and nothing half-written."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file

from sidfast import cli
from sidfast.common.errors import UserError
from sidfast.evaluation.reference import open_reference

ASSETS = ROOT / "assets"


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A folder of eight images, as a model and as a reference, and eight prompts."""
    root, rng = tmp_path_factory.mktemp("stored"), np.random.default_rng(0)
    (root / "images").mkdir()
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(root / "images" / f"{i}.png")
    (root / "prompts.txt").write_text("a cat\n" * 8)
    return root


@pytest.fixture
def folder(stored, tmp_path):
    """A copy of the images, to be damaged."""
    return shutil.copytree(stored / "images", tmp_path / "copy")


def fails(capsys, stored, out, **changes):
    values = {"model": stored / "images", "prompts": stored / "prompts.txt", "reference": stored / "images",
              "features": f"clip:{ASSETS / 'clip'}", "clip": ASSETS / "clip", "assets": ASSETS,
              "cache": out.parent / "cache", "metrics": "kid,clip", "out": out} | changes
    args = [str(part) for name, value in values.items() if value is not None
            for part in (f"--{name.replace('_', '-')}", value)]
    code = cli.main(["evaluate", *args])
    error = capsys.readouterr().err
    lines = [line for line in error.replace("\r", "\n").splitlines() if line.strip() and "batch" not in line]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("sidfast: "), error
    assert not out.exists()
    return lines[0]


@pytest.mark.parametrize("changes, words", [
    ({"metrics": ","}, ["--metrics: none given"]),
    ({"metrics": "fdi"}, ["unknown metric fdi", "is fid meant"]),
    ({"metrics": "FID"}, ["unknown metric FID", "is fid meant"]),
    ({"metrics": "fid,precison"}, ["unknown metric precison", "is precision meant"]),
    ({"metrics": "fid"}, ["8 are too few images for the covariance of 128 features", "129"]),
    ({"images": "9"}, ["8 prompts are too few for 9 images"]),
    ({"images": "1"}, ["--images (1)"]),
    ({"metrics": "diversity"}, ["--seeds-per-prompt"]),
    ({"metrics": "accuracy"}, ["not a caption of the shapes world: 'a cat'"]),
    ({"features": "inception:/nowhere.pth"}, ["/nowhere.pth: no such file", "https://"]),
    ({"features": None}, ["the feature network is missing", "inception:FILE"]),
    ({"features": "vgg:x"}, ["--features vgg:x", "inception:FILE"]),
    ({"clip": None}, ["the CLIP is missing"]),
    ({"clip": "/nowhere"}, ["no CLIP in /nowhere"]),
    ({"prompts": "/nowhere.txt"}, ["/nowhere.txt"]),
    ({"prompts": None}, ["--prompts"]),
    ({"prompts": "shapes:train"}, ["shapes:held_out"]),
    ({"reference": "/nowhere"}, ["--reference /nowhere"]),
    ({"reference": None}, ["--reference", "kid"]),
    ({"model": "/nowhere/at/all"}, ["--model /nowhere/at/all: the folder /nowhere/at/all does not exist"]),
    ({"model": "missing"}, ["--model missing: missing is neither a folder nor a hub id"]),
    ({"model": None}, ["--model is needed"]),
    ({"steps": "2"}, ["a folder of images takes neither --steps"]),
    ({"seed_offset": str(2**63)}, ["--seed-offset", "2^62"]),
    ({"cache": "/proc/nowhere"}, ["/proc/nowhere", "cannot be written"]),
    ({"model": ASSETS / "clip"}, ["assets/clip", "neither a run directory nor a diffusers pipeline"]),
    ({"seeds": "2"}, ["--seeds 2", "one set"]),
    ({"seeds": "0"}, ["--seeds (0) must be at least 1"]),
], ids=lambda v: "" if isinstance(v, list) else " ".join(f"{k}={x}" for k, x in v.items()))
def test_options(capsys, stored, tmp_path, changes, words):
    line = fails(capsys, stored, tmp_path / "r.json", **changes)
    assert all(word in line for word in words), line


@pytest.mark.parametrize("one_step", [False, True])
@pytest.mark.parametrize("damage, words", [
    (lambda f: next((f / "unet").glob("*.safetensors")).unlink(), "unet has no weights"),
    (lambda f: (f / "vae" / "config.json").write_text("[]"), "vae/config.json must be a JSON object")],
    ids=["weights", "json"])
def test_a_broken_model_is_named_by_its_option(capsys, stored, tiny_teacher, tmp_path, damage, words, one_step):
    """A pipeline of several steps, and an export, which is read as a teacher is."""
    model = shutil.copytree(tiny_teacher, tmp_path / "model")
    if one_step:
        index = json.loads((model / "model_index.json").read_text())
        index |= {"_class_name": ["pipeline", "OneStepPipeline"], "t_init": 625}
        (model / "model_index.json").write_text(json.dumps(index))
    damage(model)
    line = fails(capsys, stored, tmp_path / "r.json", model=model)
    assert line.startswith(f"sidfast: --model {model}: {model}/") and words in line and "teacher:" not in line


def test_empty_folder(capsys, stored, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "nor a folder of images" in fails(capsys, stored, tmp_path / "r.json", model=tmp_path / "empty")


def test_folder_for_the_result(capsys, stored, tmp_path):
    assert "does not exist" in fails(capsys, stored, tmp_path / "none" / "r.json", cache=tmp_path)


@pytest.mark.parametrize("name, content, words", [
    ("prompts.txt", "a cat\n", "must end in .json"), ("config.json", '{"config": {}, "command": []}', "no result of"),
    ("list.json", "[1]", "no result of"), ("empty.json", "", "no result of")])
def test_a_file_that_is_no_result_is_kept(capsys, stored, tmp_path, name, content, words):
    """Also before anything of --coco is prepared, and before a model is looked for."""
    path = tmp_path / name
    path.write_text(content)
    for args in (["--model", "/nowhere"], ["--coco", "/nowhere", "--model", "/nowhere"]):
        assert cli.main(["evaluate", *args, "--out", str(path)]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith(f"sidfast: --out {path}: ") and words in error and "\n" not in error
    assert path.read_text() == content and [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("option", ["model", "reference"])
@pytest.mark.parametrize("damage, words", [
    (lambda f: (f / "3.png").write_bytes(b"no image"), "3.png is no image or a broken one"),
    (lambda f: (f / "3.png").write_bytes((f / "3.png").read_bytes()[:3000]), "3.png is no image or a broken one"),
    (lambda f: Image.new("RGB", (32, 64)).save(f / "3.png"), "3.png is 32 x 64 and 0.png 64 x 64"),
    (lambda f: Image.new("I;16", (64, 64)).save(f / "3.png"), "3.png has more than 8 bits a channel"),
], ids=["corrupt", "truncated", "size", "16 bits"])
def test_images(capsys, stored, folder, tmp_path, option, damage, words):
    damage(folder)
    line = fails(capsys, stored, tmp_path / "r.json", **{option: folder})
    assert f"--{option}" in line and words in line
    assert {p.name for p in tmp_path.iterdir()} <= {"copy", "cache"}


def test_a_broken_image_after_good_ones_can_be_mended(capsys, stored, folder, tmp_path):
    """Nothing of the failed evaluation stays, so nothing is said of it by the next one."""
    good = (folder / "7.png").read_bytes()
    (folder / "7.png").write_bytes(good[:3000])          # only found when it is read, in the last batch
    fails(capsys, stored, tmp_path / "r.json", model=folder, batch_size=2)
    assert {p.name for p in tmp_path.iterdir()} == {"copy", "cache"}
    (folder / "7.png").write_bytes(good)
    args = {"model": folder, "prompts": stored / "prompts.txt", "clip": ASSETS / "clip", "metrics": "clip",
            "out": tmp_path / "r.json"}
    assert cli.main(["evaluate", *(str(v) for name, value in args.items() for v in (f"--{name}", value))]) == 0
    assert "afresh" not in capsys.readouterr().err


def test_size_mismatch_of_model_and_reference(capsys, stored, folder, tmp_path):
    for path in folder.iterdir():
        Image.new("RGB", (32, 32)).save(path)
    line = fails(capsys, stored, tmp_path / "r.json", model=folder)
    assert "images are 32 x 32, those of the reference 64 x 64" in line and "--resize" in line


def test_too_few_images(capsys, stored, folder, tmp_path):
    (tmp_path / "p.txt").write_text("a cat\n" * 20)
    line = fails(capsys, stored, tmp_path / "r.json", model=folder, prompts=tmp_path / "p.txt", images="20")
    assert "8 images are in the folder, 20 are asked for" in line
    for path in sorted(folder.iterdir())[3:]:
        path.unlink()
    assert "--reference: 3 images are too few" in fails(capsys, stored, tmp_path / "r.json", reference=folder)


@pytest.mark.parametrize("sigma, words", [
    (-np.eye(3), "negative eigenvalues (-1)"), (np.diag([1, 1, -0.01]), "negative eigenvalues (-0.01)"),
    (np.eye(3) + 0.1 * np.eye(3, k=1), "not symmetric"), (np.eye(3) * 1j, "sigma is complex"),
    (np.array([[1, 2, 0], [2, 1, 0], [0, 0, 1]]), "negative eigenvalues (-1)")], ids=range(5))
def test_statistics_that_no_features_have(tmp_path, sigma, words):
    np.savez(tmp_path / "s.npz", mu=np.zeros(3), sigma=sigma)
    with pytest.raises(UserError, match=re.escape(f"--reference {tmp_path / 's.npz'}: ")) as error:
        open_reference(tmp_path / "s.npz")
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64], ids=lambda t: t.__name__)
@pytest.mark.parametrize("samples", [64, 400])
def test_statistics_with_rounding_pass(tmp_path, samples, dtype):
    """Also those of fewer images than features, whose smallest eigenvalues are nothing but rounding."""
    features = np.random.default_rng(0).lognormal(-2, 1, (samples, 256)).astype(np.float32)
    mean = features.mean(0)
    sigma = features.T @ features / np.float32(samples) - np.outer(mean, mean)                # the careless formula
    np.savez(tmp_path / "s.npz", mu=mean.astype(dtype), sigma=sigma.astype(dtype))
    assert open_reference(tmp_path / "s.npz")[0].statistics[1].dtype == torch.float64


@pytest.mark.parametrize("content, words", [
    (b"zip?", "it is no .npz"), ("other", "neither a folder of images nor statistics"),
    ("nan", "non-finite"), ("small", "statistics of 3 features, the feature network has 128"),
    ("kid", "kid need the images")], ids=str)
def test_statistics(capsys, stored, tmp_path, content, words):
    path, n = tmp_path / "s.npz", 3 if content == "small" else 128
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        sigma = np.full((n, n), np.nan) if content == "nan" else np.eye(n)
        np.savez(path, **({"mean": sigma} if content == "other" else {"mu": np.zeros(n), "sigma": sigma}))
    many = tmp_path / "prompts.txt"
    many.write_text("a cat\n" * 140)
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(140):
        shutil.copy(stored / "images" / "0.png", folder / f"{i}.png")
    line = fails(capsys, stored, tmp_path / "r.json", reference=path, model=folder, prompts=many,
                 metrics="kid" if content == "kid" else "fid")
    assert words in line


def test_non_finite_pixels(capsys, stored, tiny_teacher, tmp_path):
    model = shutil.copytree(tiny_teacher, tmp_path / "model")
    weights = next((model / "vae").glob("*.safetensors"))
    state = load_file(weights)
    first = state["decoder.conv_in.weight"]
    state["decoder.conv_in.weight"] = torch.full_like(first, 3e38)              # finite, but what comes of it is not
    save_file(state, weights, {"format": "pt"})
    line = fails(capsys, stored, tmp_path / "r.json", model=model, steps="1", metrics="clip")
    assert "image 0 has non-finite pixels" in line


def test_weights_that_are_no_weights(capsys, stored, tmp_path):
    """A pickle with code in it is refused, not run."""
    import pickle

    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    (tmp_path / "w.pth").write_bytes(pickle.dumps(Harm()))
    line = fails(capsys, stored, tmp_path / "r.json", features=f"inception:{tmp_path / 'w.pth'}")
    assert "no Inception-v3 weights" in line and not (tmp_path / "harm").exists()
