"""Files of a run that were damaged or made by someone else: one line names the file, the key and the way out."""

import base64
import io
import json
import struct
import zlib

import pytest
from helpers_input import fails
from PIL import Image, PngImagePlugin
from test_fuzz import alone  # noqa: F401 (a fixture)
from test_report import points_of

from sidfast import cli, train
from sidfast.common.errors import UserError
from sidfast.common.records import parse, read_evaluations, read_lines, read_metrics
from sidfast.config.schema import load_config
from sidfast.evaluation.report import _data, _samples, write_report
from sidfast.publishing.export import read_distillation
from sidfast.publishing.grid import image_grid, read_grid
from sidfast.runs.directory import open_run
from sidfast.training import launch


@pytest.fixture
def run(write_config, tmp_path):
    """(configuration, run directory as far as its start and the report look at it)."""
    config, out = load_config(write_config()), tmp_path / "run"
    for name in ("checkpoints", "samples", "best"):
        (out / name).mkdir(parents=True)
    (out / "config.json").write_text(json.dumps({"config": config.model_dump(), "processes": 1, "command": ["a"]}))
    (out / "metrics.jsonl").write_text('{"step": 1, "images": 4, "fake_score_loss": NaN, "share_of_peak": null}\n')
    (out / "evaluation.json").write_text('{"end": {"images": 9, "fid": 1.5, "intervals": {"fid": [1, 2]}}}')
    (out / "best" / "distillation.json").write_text('{"step": 1, "seed": 123456789012345678901234567890}')
    return config, out


def evaluation(**changes):
    return json.dumps({"end": {"images": 9, "fid": 1.5} | changes})


@pytest.mark.parametrize("name, content, words", [
    ("metrics.jsonl", '{"step": 1}\n{"step": 2, "images": ' + "9" * 400 + '}\n{"step": 3}', ["line 2", "images"]),
    ("metrics.jsonl", '{"step": 1, "a": true}\n{"step": 2}', ["line 1", "a: "]),
    ("metrics.jsonl", '{"step": -1}\n{"step": 2}', ["line 1", "step"]),
    ("metrics.jsonl", '{"step": 1, "images_per_s": 0}\n', ["line 1", "images_per_s"]),
    ("metrics.jsonl", '{"step": 1, "a": [1]}\n', ["line 1", "a: "]),
    ("metrics.jsonl", '{"step": ' + "9" * 5000 + '}\n{"step": 2}\n', ["line 1", "too many digits"]),
    ("metrics.jsonl", '{"step": 1, "a": ' + "[" * 60 + "]" * 60 + '}\n{"step": 2}\n', ["line 1", "nested too deep"]),
    ("spikes.jsonl", '{"step": 1.5}\n', ["line 1", "step"]),
    ("evaluation.json", evaluation(images=10**30), ["end.images"]),
    ("evaluation.json", evaluation(intervals={"fid": [2, 1]}), ["end.intervals.fid", "low end"]),
    ("evaluation.json", evaluation(intervals={"fid": [1]}), ["end.intervals.fid"]),
    ("evaluation.json", evaluation(intervals={"fid": ["1", "2"]}), ["end.intervals.fid"]),
    ("evaluation.json", evaluation(intervals={"fid": [1, float("nan")]}), ["end.intervals.fid"]),
    ("evaluation.json", evaluation(fid=10**400), ["end.fid"]), ("evaluation.json", evaluation(fid="1"), ["end.fid"]),
    ("evaluation.json", "\xff", ["not UTF-8"]), ("evaluation.json", None, ["not a regular file"]),
    ("best/distillation.json", '{"step": "1"}', ["step"]), ("best/distillation.json", "{", ["not JSON"]),
    ("best/distillation.json", '{"evaluation": null}', ["evaluation"]),
    ("config.json", '{"config": {"train": []}}', ["train"]),
    ("config.json", '{"config": {}, "command": 3}', ["command"]),
    ("config.json", '{"config": {}, "processes": true}', ["processes"]),
    ("config.json", '{"config": {}, "hardware": {"gpus": "H200"}}', ["hardware.gpus"])], ids=lambda v: str(v)[:40])
def test_damage_is_named(run, name, content, words):
    """By the start of training and by the report, in a line of their own; training tells before it writes anything."""
    config, out = run
    (out / name).unlink(missing_ok=True)
    if content is None:
        (out / name).mkdir()
    else:
        (out / name).write_bytes(content.encode("latin-1"))
    before = sorted(out.rglob("*"))
    for action in (lambda: open_run(out, config, "auto"), lambda: write_report(out)):
        if name == "spikes.jsonl" and action.__code__.co_names == ("write_report",):
            continue                                     # (not shown)
        with pytest.raises(UserError) as caught:
            action()
        assert all(word in str(caught.value) for word in [name.rpartition("/")[2], *words]), caught.value
    assert sorted(out.rglob("*")) == before


def test_good_files_read_as_they_stand(run):
    config, out = run
    open_run(out, config, "auto")
    (line,) = read_metrics(out)
    assert list(line) == ["step", "images", "fake_score_loss", "share_of_peak"] and line["images"] == 4
    assert read_evaluations(out)["end"]["intervals"] == {"fid": [1, 2]}
    assert read_distillation(out / "best")["seed"] == 123456789012345678901234567890 and not read_distillation(out)
    write_report(out)
    assert "1.5" in (out / "report.html").read_text()


def test_a_line_that_was_being_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for rest in (b'{"step": 2', b"\0\0\0", b'{"step": 2, "a": "\xc3'):
        path.write_bytes(b'{"step": 1}\r\n\n'.replace(b"\n\n", b"\n") + rest)
        assert list(read_lines(path)) == [{"step": 1}]


def test_words_that_are_not_utf_8(run):
    """A command with a Latin-1 path: Python hands on half surrogate pairs, which no file can hold."""
    config, out = run
    described = json.loads((out / "config.json").read_text()) | {"command": ["train.py", "--out", "caf\udce9"]}
    (out / "config.json").write_text(json.dumps(described))
    open_run(out, config, "auto")
    write_report(out)
    assert "caf\\udce9" in (out / "report.html").read_text(encoding="utf-8")
    assert parse(b'["\\ud83d\\ude00"]') == ["\U0001f600"]


def test_metrics_out_of_order(run):
    """Steps twice or backwards are drawn from left to right."""
    _, out = run
    (out / "metrics.jsonl").write_text("".join(
        json.dumps({"step": step, "generator_loss": loss}) + "\n" for step, loss in ((4, 1.0), (2, 3.0), (2, 2.0))))
    write_report(out)
    x = [x for x, _ in points_of((out / "report.html").read_text().split("<svg")[1])]
    assert len(x) == 3 and x == sorted(x)


# Grids of samples


def grid_with(path, **changes):
    """A grid of 2 x 2 images with another text chunk."""
    picture = image_grid({"a": [Image.new("RGB", (64, 64), "red")] * 2, "b": [Image.new("RGB", (64, 64))] * 2}, "xy")
    text = PngImagePlugin.PngInfo()
    text.add_text("sidfast-grid", json.dumps(json.loads(picture.info["sidfast-grid"]) | changes))
    picture.save(path, pnginfo=text)
    return path


@pytest.mark.parametrize("changes, words", [
    ({"tile": [10**9, 128]}, "tile.0"), ({"tile": [0, 128]}, "tile.0"), ({"tile": [128]}, "tile"),
    ({"tile": [64, 128]}, "pixels, where its text says"), ({"prompts": ["x"] * 3}, "pixels, where its text says"),
    ({"prompts": "xy"}, "prompts"), ({"prompts": [1, 2]}, "prompts.0"), ({"rows": []}, "rows"), ({"top": -1}, "top"),
    ({"image": [16384, 16384]}, "larger than its tile"), ({"image": [64, True]}, "image.1")], ids=str)
def test_grid_whose_text_is_wrong(tmp_path, changes, words):
    assert read_grid(grid_with(tmp_path / "good.png"))[0] == ["x", "y"]
    with pytest.raises(UserError, match="is damaged") as caught:
        read_grid(grid_with(tmp_path / "x.png", **changes))
    assert f"{tmp_path / 'x.png'}: " in str(caught.value) and words in str(caught.value)


def png(width, height, text):
    """A PNG with a text chunk and without pixels: whoever decodes it fails."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"tEXt", b"sidfast-grid\0" + text),
        (b"IDAT", b""), (b"IEND", b"")))


@pytest.mark.parametrize("width, height, words", [(60_000, 60_000, "bomb"), (13_000, 13_000, "where its text says"),
                                                  (388, 274, "")], ids=["bomb", "large", "cut"])
def test_grids_that_are_not_decoded(tmp_path, width, height, words):
    layout = {"prompts": ["x", "y"], "rows": ["a", "b"], "tile": [128, 128], "image": [64, 64], "top": 6}
    (tmp_path / "x.png").write_bytes(png(width, height, json.dumps(layout).encode()))
    with pytest.raises(UserError, match="is damaged") as caught:
        read_grid(tmp_path / "x.png")
    assert words in str(caught.value)


def test_samples_of_odd_kinds(tmp_path):
    """Folders and other pictures are passed over."""
    (tmp_path / "samples" / "step-00000003.png").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "samples" / "step-00000002.png")
    assert _samples(tmp_path) is None
    grid_with(tmp_path / "samples" / "step-00000001.png")
    assert [frame["step"] for frame in _samples(tmp_path)["frames"]] == [1]


@pytest.mark.parametrize("size, shown", [((129, 17_000), (8, 1024)), ((5000, 3), (256, 1)), ((512, 768), (256, 384))])
def test_images_of_any_shape(size, shown):
    """(WebP takes at most 16383 pixels a side.)"""
    image = Image.open(io.BytesIO(base64.b64decode(_data(Image.new("RGB", size)).split(",")[1])))
    assert image.size == shown


# What becomes of a run


def test_a_report_that_fails_costs_a_run_nothing(write_config, tmp_path, capsys, monkeypatch, alone):  # noqa: F811
    """Neither a fault of a file nor one of ours: a line each, the other files are written, exit 0."""
    out = tmp_path / "run"
    args = ["--config", str(write_config(**{"train.save_every": 1})), "--out", str(out)]
    assert train.main([*args, "--set", "train.steps=1"]) == 0
    (out / "samples" / "step-00000007.png").write_bytes(b"\x89PNG")
    (out / "report.html").unlink()

    def card(run, export, title):
        raise KeyError(f"a fault of ours in {export.name}")

    monkeypatch.setattr("sidfast.runs.preview.write_card", card)
    capsys.readouterr()
    assert train.main([*args, "--set", "train.steps=2"]) == 0
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if "is not written" in line]
    assert len(lines) == 3 and "Traceback" not in said and not (out / "report.html").exists()
    assert "step-00000007.png: is damaged" in lines[2] and "a fault of ours in export" in lines[0]
    assert read_distillation(out / "export")["step"] == 2
    assert "step-00000007.png" in fails(capsys, cli.main, "report", "--run", out)


def test_end_of_a_run_without_its_start(tmp_path, capsys):
    """A full disk may have left evaluation.json out, or another start of the run measured other metrics."""
    for content in (None, '{"start": {"images": 9, "kid": 1.0}}', "{"):
        if content:
            (tmp_path / "evaluation.json").write_text(content)
        launch._report(tmp_path, {"images": 9, "fid": 2.5})
        said = capsys.readouterr()
        assert "2.5000" in said.out and ("evaluation.json: is damaged" in said.err) == (content == "{")


def test_report_that_cannot_be_written(run, capsys):
    _, out = run
    (out / "report.html").mkdir()
    assert "report.html cannot be written" in fails(capsys, cli.main, "report", "--run", out)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"_class_name": %s}' % ("9" * 5000), "\xff", "[]", "null"],
                         ids=["deep", "digits", "bytes", "list", "null"])
def test_sample_with_a_broken_index(tmp_path, capsys, content):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_bytes(content.encode("latin-1"))
    line = fails(capsys, cli.main, "sample", "--model", tmp_path / "model", "--prompt", "x", "--out",
                 tmp_path / "x.png")
    assert "model_index.json" in line and not (tmp_path / "x.png").exists()
