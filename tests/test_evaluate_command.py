"""`sidfast evaluate` of a model: interrupted and gone on with, rows and locks, and what training says of itself."""

import json
import os

import pytest
import torch
from helpers_evaluate import ASSETS, arguments, run, shapes_judge

from sidfast import cli
from sidfast.common.errors import INTERRUPTED
from sidfast.common.files import drop_lock, take_lock
from sidfast.evaluation.command import Request, evaluate_model
from sidfast.evaluation.evaluate import evaluate, held_out_captions, pipeline_generator
from sidfast.evaluation.images import sized
from sidfast.evaluation.rows import FolderRows, collect


@pytest.fixture(scope="module")
def export(tiny_teacher, tmp_path_factory):
    """A one-step pipeline of 16 x 16 images, as a training run exports it."""
    from sidfast.publishing.export import write_export
    from sidfast.teachers.load import load_teacher

    teacher, folder = load_teacher(str(tiny_teacher)), tmp_path_factory.mktemp("export") / "export"
    write_export(teacher.one_step_pipeline(teacher.network, 625), folder)
    return folder


def of_shapes(export, root, **changes):
    return {"model": str(export), "prompts": "shapes:held_out", "images": "144", "batch_size": "8", "resize": "64",
            "assets": str(ASSETS), "cache": str(root / "cache")} | changes


@pytest.fixture(scope="module")
def whole(export, tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    return run(of_shapes(export, root), root / "r.json")


def test_command_and_training_agree(export, whole):
    """The command's numbers are those that a training run writes of itself."""
    from sidfast.publishing.load import load_pipeline

    generate = pipeline_generator(load_pipeline(export, "cpu")[0])

    def resized(prompts, seeds):
        return sized(lambda *_: generate(prompts, seeds), 64)(seeds.start, seeds.stop)

    want = evaluate(resized, held_out_captions(144), shapes_judge(), 8)
    assert want.pop("images") == 144 and whole["metrics"] == want            # exact: same bits


@pytest.mark.parametrize("blocks", [1, 13])
def test_interrupted_evaluation_gives_the_same_numbers(export, whole, tmp_path, monkeypatch, blocks):
    put = FolderRows.put

    def interrupted(self, start, rows):
        if "clip_cosine" in rows and start >= 8 * blocks:
            raise KeyboardInterrupt
        put(self, start, rows)

    monkeypatch.setattr(FolderRows, "put", interrupted)
    assert cli.main(arguments(of_shapes(export, tmp_path), tmp_path / "r.json")) == INTERRUPTED
    monkeypatch.undo()
    assert not (tmp_path / "r.json").exists()
    assert len(list((tmp_path / ".r.json.partial").glob("block-*"))) == blocks
    again = run(of_shapes(export, tmp_path), tmp_path / "r.json")
    assert again["metrics"] == whole["metrics"]          # exact: same bits
    assert again["resumed_after"] == 8 * blocks and whole["resumed_after"] == 0
    assert [p.name for p in tmp_path.iterdir() if p.name != "cache"] == ["r.json"]


def test_an_image_depends_on_its_seed_and_prompt_alone(export, whole, tmp_path):
    other = run(of_shapes(export, tmp_path, batch_size="5"), tmp_path / "r.json")["metrics"]
    for name, value in whole["metrics"].items():
        assert other[name] == pytest.approx(value, rel=1e-4), name


def test_blocks_of_another_evaluation_are_not_taken(export, tmp_path, capsys):
    partial = tmp_path / ".r.json.partial"
    partial.mkdir()
    (partial / "block-00000000.safetensors").write_bytes(b"other")
    run(of_shapes(export, tmp_path, images="16", metrics="clip"), tmp_path / "r.json")
    assert "starting afresh" in capsys.readouterr().err


def test_a_lock_that_was_left_behind_is_free(tmp_path):
    (tmp_path / "lock").touch()
    lock = take_lock(tmp_path / "lock")
    assert lock and take_lock(tmp_path / "lock") is None
    drop_lock(lock)
    assert not (tmp_path / "lock").exists()
    drop_lock(take_lock(tmp_path / "lock"))


def test_rows_of_other_images_are_no_result(tmp_path):
    """A block that nobody asked for is found before any number is made of it."""
    rows = FolderRows(tmp_path / "rows", {})
    rows.open()
    rows.put(4, {"x": torch.zeros(3)})
    with pytest.raises(RuntimeError, match="4 images were to be measured, and there are rows of 7"):
        collect(lambda start, stop: torch.zeros(stop - start), [""] * 4, lambda x, *_: {"x": x}, rows, 2, "test")


def test_two_that_open_the_same_rows(tmp_path):
    """Whoever comes second finds the folder with its key in it, and keeps the blocks."""
    first, second = (FolderRows(tmp_path / "rows", {"a": 1}) for _ in range(2))
    assert first.open()
    first.put(0, {"x": torch.zeros(2)})
    assert second.open() and second.count() == 2
    assert FolderRows(tmp_path / "rows", {"a": 2}).open() is False and first.count() == 0
    assert os.listdir(tmp_path) == ["rows"]


def test_request_defaults_are_the_command_lines(tiny_teacher, tmp_path, capsys):
    """Several seeds a prompt, a steps-and-guidance model, bf16, and resizing, in one go."""
    request = Request(model=str(tiny_teacher), resize=64, out=tmp_path / "r.json", prompts="shapes:held_out",
                      images=8, seeds_per_prompt=4,
                      metrics="clip,diversity", steps=2, guidance=1.5, dtype="bf16", seed_offset=7, assets=str(ASSETS))
    evaluate_model(request, torch.device("cpu"))
    got = json.loads((tmp_path / "r.json").read_text())
    assert got["model"]["steps"] == 2 and got["model"]["guidance"] == 1.5 and got["model"]["dtype"] == "bf16"
    assert got["seeds"] == {"first": 7, "last": 14, "per_prompt": 4} and "reference" not in got
    head, *rows, last = capsys.readouterr().out.splitlines()                     # numbers with intervals, and the file
    assert head.split() == ["metric", "value", "95", "%", "interval"] and len(rows) == 2
    for row, (name, words) in zip(rows, (("clip_score", ["CLIP", "score"]), ("diversity_small_clip", [
            "diversity", "(small", "CLIP)"])), strict=True):
        low, high = (f"{end:.4g}" for end in got["intervals"][name])
        assert row.split() == [*words, f"{got['metrics'][name]:.4g}", low, "to", high]
    assert last == f"{tmp_path / 'r.json'}: 8 images of {tiny_teacher}"
    assert os.listdir(tmp_path) == ["r.json"]
