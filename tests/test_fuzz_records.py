"""Whatever is done to the files of a run, a result or a study: they read, or one line names the file."""

import json
import types

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image, PngImagePlugin
from test_fuzz import QUICK

from sidfast import cli
from sidfast.common.errors import UserError, one_line
from sidfast.common.records import Line, read_lines, read_metrics
from sidfast.config.schema import load_config
from sidfast.evaluation import report
from sidfast.planning import plan
from sidfast.publishing.grid import image_grid, read_grid, save_grid
from sidfast.runs.directory import open_run
from sidfast.studies import worker
from sidfast.studies.plots import plots
from sidfast.studies.record import write_outcome, write_record
from sidfast.studies.report import page
from sidfast.studies.results import collect, costs
from sidfast.studies.study import read_study
from sidfast.studies.table import markdown

NESTED = [1]
for _ in range(70):
    NESTED = [NESTED]
HOSTILE = [None, True, False, 0, -1, 1, 3, 2**63, -2**70, 10**400, -10**4000, 0.5, 1e29, 1e308, -1e308, 5e-324, -0.0,
           float("nan"), float("inf"), -float("inf"), "", "x", "1", "$\\frac{", "<script>", "a|b`",
           "a\n\x00\x1b[31m", "\ud800", "=1+1", "../../x", "x" * 3000, [], [1], [2, 1], [1e300, 1e308],
           ["a", "b"], [[], {}], {}, {"a": 1},
           {"step": "1"}, {"fid/../../x": 1.0}, NESTED]
NUMBERS = [None, 0, 1, 7, 1.5, -3, 1e-7, 5e-324, 9e29, -9e29, 1e308, 2**62, 10**400]            # in place of numbers
RAW = {"cut": lambda raw, n: raw[:n % len(raw)], "byte": lambda raw, n: b"\xff".join((raw[:n], raw[n:])),
       "deep": lambda raw, n: b"[" * 100_000, "digits": lambda raw, n: raw.replace(b"1", b"1" * 5000, 1),
       "bom": lambda raw, n: b"\xef\xbb\xbf" + raw, "empty": lambda raw, n: b"",
       "utf-16": lambda raw, n: raw.decode().encode("utf-16"),
       "null": lambda raw, n: b"null", "zeros": lambda raw, n: raw[:n % len(raw)] + b"\0" * 40,
       "twice": lambda raw, n: raw + raw, "lines": lambda raw, n: raw.replace(b"\n", b"\r\n")}


def place(value, n):
    """The path of a value in nested sections and lists, by the digits of `n`; upper levels are as likely as lower."""
    path = ()
    while isinstance(value, (dict, list)) and value and (not path or n % 4):
        n, k = divmod(n // 4, len(value))
        key = list(value)[k] if isinstance(value, dict) else k
        path, value = (*path, key), value[key]
    return path


def damaged(value, path, action, bad):
    """A copy with the value at a path replaced or removed, or with a hostile key next to it."""
    if not path:
        return bad if action == "replace" else value
    value = json.loads(json.dumps(value))
    *outer, last = path
    inner = value
    for key in outer:
        inner = inner[key]
    if action == "replace" or (action == "number" and isinstance(inner[last], (int, float))):
        inner[last] = bad
    elif action == "remove":
        del inner[last]
    elif action == "add" and isinstance(inner, dict):
        inner[bad if isinstance(bad, str) else "new"] = inner[last] if isinstance(bad, str) else bad
    return value


@st.composite
def damages(draw, files):
    """(name of one of the files, its new bytes); `files`: {name: value, or a list of lines}."""
    name = draw(st.sampled_from(sorted(files)))
    value, lines = files[name], name.endswith(".jsonl")
    n = draw(st.integers(0, 10**6))
    if draw(st.integers(0, 4)) == 0:
        return name, RAW[draw(st.sampled_from(sorted(RAW)))](written(value, lines), n)
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.integers(0, 10**9).map(lambda n, value=value: place(value, n)))
        action = draw(st.sampled_from(["replace", "number", "number", "remove", "add"]))
        bad = draw(st.sampled_from(NUMBERS if action == "number" else HOSTILE))
        if path or not lines:
            value = damaged(value, path, action, bad)
    return name, written(value, lines)


def written(value, lines):
    return ("".join(json.dumps(line) + "\n" for line in value) if lines else json.dumps(value, indent=1)).encode()


def fuzz(files, folder, options, *uses):
    """Damage one of the files in `folder` at a time; each use of it works, or raises UserError. Returns how often each
    happened."""
    ended = {"ran": 0, "refused": 0}

    @options
    @given(damages(files))
    def once(case):
        name, raw = case
        good = (folder / name).read_bytes()
        (folder / name).write_bytes(raw)
        try:
            for use in uses:
                try:
                    use()
                except UserError as error:
                    line = one_line(error)
                    assert len(line) < 1500 and line.isprintable()
                    ended["refused"] += 1
                else:
                    ended["ran"] += 1
        finally:
            (folder / name).write_bytes(good)

    once()
    return ended


EXAMPLES = settings(QUICK, max_examples=100)
MEASURES = {"images": 100, "accuracy": 0.6, "clip_score": 0.8, "fid_small_clip": 12.8,
            "intervals": {"accuracy": [0.58, 0.65]}, "protocol": "p"}
DISTILLATION = {"teacher": "t", "guidance": {f"kappa{k}": 1.5 for k in range(1, 5)}, "seed": 0, "step": 4,
                "settings": "x"}


@pytest.fixture
def run(tmp_path, write_config):
    """(configuration, run directory, {name: value} of its files)."""
    config, out = load_config(write_config()), tmp_path / "run"
    files = {
        "config.json": {"config": config.model_dump(), "command": ["train.py", "--out", "x"], "python": "3.11",
                        "versions": {"torch": "2", "triton": None}, "git": "abc", "inputs": {"data.prompts": "0"},
                        "hardware": {"gpus": ["H200"], "cpus": 2, "processor": "x"}, "processes": 2},
        "metrics.jsonl": [{"step": n, "images": 8 * n, "images_per_s": 20.0, "tflops_per_gpu": 20 * 1e9 / 1e12 / 2,
                           "share_of_peak": None, "fake_score_loss": 1 / n, "generator_loss": -n, "peak_gib": 1.0,
                           "seconds/evaluation": 0.1, "evaluation/fid_small_clip": 9.0} for n in (1, 2, 4)],
        "spikes.jsonl": [{"step": 1, "network": "generator", "loss": 3.0, "median": 0.1, "samples": []}],
        "evaluation.json": {"start": MEASURES, "teacher": MEASURES, "end": MEASURES | {"step": 4}},
        "best/distillation.json": DISTILLATION | {"best_by": "fid_small_clip", "evaluation": MEASURES | {"step": 2}}}
    for name in ("best", "checkpoints", "samples"):
        (out / name).mkdir(parents=True)
    for name, value in files.items():
        (out / name).write_bytes(written(value, name.endswith(".jsonl")))
    return config, out, files


def study_numbers(out, config):
    lines = read_metrics(out)
    worker._training_seconds(lines)
    worker._seconds_between_steps(lines)
    worker._curve(lines, config, None)
    list(read_lines(out / "spikes.jsonl", Line))


def test_runs(run, monkeypatch):
    config, out, files = run
    drawn, draw = {}, report.line_chart

    def draw_once(*args, **options):
        key = repr((args, options))
        if key not in drawn:
            drawn[key] = draw(*args, **options)
        return drawn[key]

    monkeypatch.setattr(report, "line_chart", draw_once)                         # (most charts are those of before)
    monkeypatch.setattr(plan, "Planner", lambda *_: types.SimpleNamespace(flops=1e9))
    ended = fuzz(files, out, EXAMPLES, lambda: open_run(out, config, "auto"), lambda: report.write_report(out),
                 lambda: plan.measured_throughput(out, None), lambda: study_numbers(out, config))
    assert ended["ran"] > 100 and ended["refused"] > 100, ended


def test_results(tmp_path, monkeypatch):
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)                # (half a second)
    result = {"model": {"path": "m", "sha256": "0", "steps": 1, "guidance": None, "dtype": "fp32",
                        "distillation": DISTILLATION}, "prompts": {"source": "p", "sha256": "a"}, "images": 100,
              "reference": {"sha256": "b"}, "features": {"sha256": "c"}, "clip": {"sha256": "d"}, "resampling": None,
              "seeds": {"first": 0, "last": 99, "per_prompt": 1}, "metrics": {"clip_score": 0.3, "fid": 9.0},
              "intervals": {"of": "95 %", "clip_score": [0.29, 0.31]}, "tf32": False,
              "repeats": [{"seeds": {"first": 0, "last": 99}, "metrics": {"fid": 9.0}}]}
    files = {name: json.loads(json.dumps(result)) for name in ("a.json", "b.json", "c 2.json")}
    files["b.json"]["seeds"] = {"first": 100, "last": 199, "per_prompt": 1}
    files["c 2.json"]["model"]["distillation"]["guidance"]["kappa4"] = 3
    (tmp_path / "r").mkdir()
    for name, value in files.items():
        (tmp_path / "r" / name).write_bytes(written(value, False))

    def compare():
        from sidfast.evaluation.compare import compare

        before = sorted(tmp_path.iterdir())
        try:
            compare([f"x={tmp_path / 'r'}"], tmp_path / "out", False)
        except UserError as error:
            assert any(name in str(error) for name in files) and sorted(tmp_path.iterdir()) == before
            raise

    ended = fuzz(files, tmp_path / "r", EXAMPLES, compare)
    assert ended["ran"] > 10 and ended["refused"] > 40, ended


def test_studies(tmp_path, tiny_config, monkeypatch):
    (tmp_path / "base.json").write_text(json.dumps(tiny_config))
    (tmp_path / "study.json").write_text(json.dumps({
        "question": "?", "base": "base.json", "images": 32, "seeds": [0, 1], "teacher": [1.5],
        "variants": {"a": {}, "b": {"loss.alpha": 0.5}}, "evaluation": {"images": 130}}))
    study, out = read_study(tmp_path / "study.json"), tmp_path / "out"
    metrics = {"fid_small_clip": 3.0, "clip_score": 0.3, "accuracy": 0.5}
    for run in study.runs:
        write_record(out, study, run, "done", None, metrics, [(16, metrics), (32, metrics)])
        (out / run.folder / "cost.json").write_bytes(written({"training_s": 1.0, "runs_at_once": 2, "device": "C"}, 0))
    write_outcome(out, study.teacher[0], "done", metrics=metrics, repeats=[metrics, metrics])
    names = ("runs/a/seed-0/result.json", "runs/b/seed-1/result.json", "runs/a/seed-0/cost.json",
             "teacher/guidance-1.5/result.json")
    files = {name: json.loads((out / name).read_text()) for name in names}
    monkeypatch.setattr("sidfast.studies.report._prompts", lambda _: [])

    def show():
        from sidfast.studies.record import check_record

        for run in study.runs:
            check_record(out, study, run)
        results, cost = collect(study, out), costs(study, out)
        assert all("/" not in name for name in plots(results))
        markdown(results, cost)
        page(study, out, results, cost, {})

    ended = fuzz(files, out, settings(QUICK, max_examples=40), show)
    assert ended["ran"] > 5 and ended["refused"] > 15, ended


def test_grids(tmp_path):
    tile = Image.new("RGB", (64, 64), "red")
    picture = image_grid({"a": [tile] * 2, "b": [tile] * 2}, ["x", "y"])
    layout = {"layout": json.loads(picture.info["sidfast-grid"])}

    def read():
        text = PngImagePlugin.PngInfo()
        text.add_itxt("sidfast-grid", (tmp_path / "layout").read_bytes().decode("latin-1"))
        picture.save(tmp_path / "step-1.png", pnginfo=text)
        try:
            read_grid(tmp_path / "step-1.png")
        except UserError as error:
            assert "step-1.png: is damaged" in str(error)
            raise

    save_grid(picture, tmp_path / "good.png")
    (tmp_path / "layout").write_bytes(written(layout["layout"], False))
    ended = fuzz(layout, tmp_path, settings(QUICK, max_examples=80), read)
    assert ended["ran"] > 5 and ended["refused"] > 30, ended


def test_tables_in_the_repository_are_those_of_its_results():
    """Of the studies behind docs/ablations.md."""
    for folder in sorted((ROOT / "docs" / "studies").iterdir()):
        results, cost = (json.loads((folder / name).read_text()) for name in ("results.json", "costs.json"))
        assert markdown(results, cost) == (folder / "table.md").read_text()


def test_report_command_refuses(run, capsys):
    """Through the command: exit 2, one line with file and key."""
    _, out, _ = run
    (out / "metrics.jsonl").write_text('{"step": 1, "images": 8}\n{"step": 2, "images": 1e999}\n{"step": 3}\n')
    assert cli.main(["report", "--run", str(out)]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "metrics.jsonl, line 2: is damaged (images: " in line and "mend or remove" in line
