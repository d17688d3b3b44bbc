"""Intervals against scipy and by coverage; sets of seeds; resampling; a hub model's commit."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from scipy import stats

from sidfast import cli
from sidfast.common.errors import INTERRUPTED
from sidfast.evaluation import metrics
from sidfast.evaluation.images import sized
from sidfast.evaluation.intervals import of_mean, of_repeats, of_share
from sidfast.evaluation.rows import MemoryRows

ASSETS = ROOT / "assets"


def test_against_scipy():
    values = np.random.default_rng(0).normal(3, 2, 50)
    want = stats.norm.interval(0.95, values.mean(), stats.sem(values))
    assert of_mean(torch.from_numpy(values)) == pytest.approx(want)
    mean, interval = of_repeats(values[:3].tolist())
    assert mean == pytest.approx(values[:3].mean())
    assert interval == pytest.approx(stats.t.interval(0.95, 2, mean, stats.sem(values[:3])))
    assert of_repeats([1.5]) == (1.5, None) and of_mean([1.0]) is None


def test_shares_stay_between_0_and_1():
    """Over repeats, and over prompts with several images each; what is no share goes where Student's t goes."""
    assert of_repeats([0.9, 1.0], share=True) == (pytest.approx(0.95), (pytest.approx(0.3147, abs=1e-4), 1.0))
    each = [{"accuracy_layout": 0.99, "precision_clip": 0.02, "recall": 0.5, "fid": 0.1},
            {"accuracy_layout": 0.90, "precision_clip": 0.01, "recall": 0.51, "fid": 0.2}]
    spread = {name: interval for name, (_, interval) in metrics.over_repeats(each).items()}
    assert spread["accuracy_layout"][1] == 1 and spread["precision_clip"][0] == 0 and spread["fid"][0] < 0
    assert spread["recall"] == pytest.approx((0.505 - 0.0635, 0.505 + 0.0635), abs=1e-4)
    rows, right = MemoryRows(), torch.ones(20, dtype=torch.bool)
    right[0] = False
    rows.put(0, {f"right_{name}": right for name in ("all", *metrics.ATTRIBUTES)})
    assert metrics.intervals(rows, {"accuracy"}, per_prompt=2)["accuracy"][1] == 1


def test_a_share_of_all_still_has_a_width():
    low, high = of_share(torch.ones(100, dtype=torch.bool))
    assert low == pytest.approx(100 / (100 + 1.959964**2)) and high == 1          # Wilson's formula at p = 1


@pytest.mark.parametrize("per_prompt, least", [(1, 0.92), (4, 0.92)])
def test_coverage(per_prompt, least):
    """In 95 of 100 draws the interval holds the truth, also where the images of a prompt are alike."""
    rng, hits, prompts = np.random.default_rng(1), 0, 120
    for _ in range(300):
        easy = rng.normal(0, 0.05, (prompts, 1))         # what the images of a prompt share
        cosine = 0.3 + easy + rng.normal(0, 0.02, (prompts, per_prompt))
        rows = MemoryRows()
        rows.put(0, {"clip_cosine": torch.from_numpy(cosine.ravel())})
        low, high = metrics.intervals(rows, {"clip"}, per_prompt=per_prompt)["clip_score"]
        hits += low <= 0.3 <= high
    assert least <= hits / 300 <= 0.985


def test_names_are_those_of_compute():
    """`names` announces what `compute` and `intervals` give, for all metrics at once."""
    rng, rows, reference = torch.Generator().manual_seed(0), MemoryRows(), MemoryRows()
    embeddings = torch.nn.functional.normalize(torch.randn(40, 8, generator=rng), dim=1)
    flags = {f"right_{name}": torch.rand(40, generator=rng) > 0.5 for name in ("all", *metrics.ATTRIBUTES)}
    rows.put(0, {"features": embeddings, "clip_cosine": torch.rand(40, generator=rng), "clip_embedding": embeddings,
                 **flags})
    reference.put(0, {"features": embeddings.flip(1)})
    from sidfast.evaluation.reference import Reference

    wanted = set(metrics.METRICS)
    got = metrics.compute(rows, wanted, Reference("", "", 40, rows=reference), "_clip", "_small_clip", 2)
    assert list(got) == metrics.names(wanted, "_clip", "_small_clip")
    spread = metrics.intervals(rows, wanted, "_small_clip", 2)
    assert spread.keys() == {n for n in got if n.startswith(("accuracy", "clip_score", "diversity"))}
    assert all(low <= got[name] <= high for name, (low, high) in spread.items())
    assert metrics.title("fid") == "FID (Inception)" and metrics.title("kid_clip") == "KID (CLIP)"
    assert metrics.title("fid_small_clip") == "FID (small CLIP)" and metrics.title("clip_score") == "CLIP score"


def run(model, out, *args, code=0):
    """The result of the command, measured by the CLIP score alone; None if it must end with another code than 0."""
    command = ["evaluate", "--model", model, "--prompts", "shapes:held_out", "--metrics", "clip,accuracy",
               "--resize", 64, "--images", 6, "--assets", ASSETS, "--cache", out.parent, "--steps", 1, "--out", out,
               *args]
    assert cli.main([str(part) for part in command]) == code
    return None if code else json.loads(out.read_text())


@pytest.fixture(scope="module")
def three(tiny_teacher, tmp_path_factory):
    return run(tiny_teacher, tmp_path_factory.mktemp("three") / "r.json", "--seeds", 3, "--seed-offset", 10)


def test_sets_of_seeds(three, tiny_teacher, tmp_path):
    """Each set equals a run of its own with those seeds, bit for bit; the interval is Student's t."""
    assert three["seeds"] == {"first": 10, "last": 27, "per_prompt": 1}
    each = [run(tiny_teacher, tmp_path / f"{k}.json", "--seed-offset", 10 + 6 * k) for k in range(3)]
    assert [r["metrics"] for r in each] == [r["metrics"] for r in three["repeats"]]
    assert [r["seeds"] for r in each] == [r["seeds"] for r in three["repeats"]]
    values = [r["metrics"]["clip_score"] for r in each]
    assert len(set(values)) == 3 and three["metrics"]["clip_score"] == pytest.approx(np.mean(values))
    want = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert three["intervals"]["clip_score"] == pytest.approx(want)
    assert "over images" in each[0]["intervals"]["of"] and "3 sets of seeds" in three["intervals"]["of"]
    assert cli.main(["compare", *(str(tmp_path / f"{k}.json") for k in range(3)), "--out", str(tmp_path / "out")]) == 0
    assert "3 | 1 | 1.5 |" in (tmp_path / "out" / "table.md").read_text()


def test_interrupted_between_sets(three, tiny_teacher, tmp_path, monkeypatch):
    from sidfast.evaluation.rows import FolderRows

    put = FolderRows.put

    def interrupted(self, start, rows):
        if self.folder.name.endswith("-3"):
            raise KeyboardInterrupt
        put(self, start, rows)

    monkeypatch.setattr(FolderRows, "put", interrupted)
    run(tiny_teacher, tmp_path / "r.json", "--seeds", 3, "--seed-offset", 10, code=INTERRUPTED)
    monkeypatch.undo()
    again = run(tiny_teacher, tmp_path / "r.json", "--seeds", 3, "--seed-offset", 10)
    assert again["repeats"] == three["repeats"] and [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_what_more_sets_of_seeds_left_goes_too(tiny_teacher, tmp_path):
    for name in (".r.json.partial-3", ".r.json.partial-of-mine", ".s.json.partial"):
        (tmp_path / name).mkdir()
    run(tiny_teacher, tmp_path / "r.json")
    assert {p.name for p in tmp_path.iterdir()} == {"r.json", ".r.json.partial-of-mine", ".s.json.partial"}


@pytest.mark.parametrize("name, filter_", [
    ("bicubic", Image.Resampling.BICUBIC), ("bilinear", Image.Resampling.BILINEAR),
    ("lanczos", Image.Resampling.LANCZOS)])
def test_filters_are_pillows(name, filter_):
    """Each of them, antialiased, on 8-bit images: within a level and a half of Pillow's own 8-bit arithmetic."""
    pixels = np.random.default_rng(0).integers(60, 200, (2, 96, 96, 3), np.uint8)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    got = sized(lambda *_: images, 40, name)(0, 2)
    want = np.stack([np.asarray(Image.fromarray(p).resize((40, 40), filter_)) for p in pixels])
    assert np.abs(got.permute(0, 2, 3, 1).numpy() * 255 - want).max() < 1.5


def test_a_hub_model_is_named_by_its_commit(tiny_teacher, tmp_path, monkeypatch):
    """From the hub's cache, as a download leaves it, without a network."""
    import shutil

    cache, commit = tmp_path / "hub", "0123456789abcdef0123456789abcdef01234567"
    place = cache / "models--someone--tiny"
    shutil.copytree(tiny_teacher, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    result = run("someone/tiny", tmp_path / "r.json")
    assert result["model"]["revision"] == commit and result["model"]["path"] == "someone/tiny"
    assert len(result["model"]["sha256"]) == 64
