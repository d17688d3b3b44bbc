"""`sidfast compare`: the table, the plot and the paper's points."""

import csv
import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats

from sidfast import cli
from sidfast.evaluation.compare import _curve, _number
from sidfast.evaluation.results import read_groups


@pytest.fixture
def results(tmp_path):
    """Two results as `sidfast evaluate` writes them."""
    paths = []
    for name, fid, score, guidance in (("student", 9.123456, 0.3012, None), ("teacher", 8.5, 0.31, 7.5)):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps({
            "model": {"path": name, "steps": 50 if guidance else 1, "guidance": guidance}, "images": 30000,
            "prompts": {"sha256": "a"}, "reference": {"sha256": "b"}, "metrics": {"clip_score": score, "fid": fid}}))
    return paths


def test_table_and_plot(results, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["compare", *map(str, results), "--out", str(out), "--paper"]) == 0
    assert capsys.readouterr().out == f"{out}: table.md, table.csv, fid-clip-score.png, fid-clip-score.svg\n"
    assert sorted(p.name for p in out.iterdir()) == ["fid-clip-score.png", "fid-clip-score.svg", "table.csv",
                                                     "table.md"]
    rows = list(csv.DictReader((out / "table.csv").open()))
    assert [(r["result"], r["steps"], r["fid"], r["clip_score"]) for r in rows] == [
        ("student", "1", "9.123456", "0.3012"), ("teacher", "50", "8.5", "0.31")]
    table = (out / "table.md").read_text()
    assert "| student | 30000 | 1 | 1 |  | 9.123 | 0.3012 |" in table and "do not compare" not in table
    assert Image.open(out / "fid-clip-score.png").size[0] > 900
    svg = ElementTree.parse(out / "fid-clip-score.svg")
    hollow = [e for e in svg.iter("{http://www.w3.org/2000/svg}use") if "fill: none" in e.get("style", "")
              or "fill-opacity: 0" in e.get("style", "")]
    assert len(hollow) >= 9                              # the paper's nine points


def write(folder, name, fid, score, model, first=0, intervals=None):
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({
        "model": {"path": name, "steps": 1, "guidance": None} | model, "images": 100, "prompts": {"sha256": "a"},
        "reference": {"sha256": "b"}, "seeds": {"first": first, "last": first + 99, "per_prompt": 1},
        "metrics": {"clip_score": score, "fid": fid}, "intervals": intervals or {}}))
    return path


def student(kappa, seed, **changes):
    return {"sha256": f"{kappa}-{seed}", "distillation": {
        "teacher": "t", "settings": "x", "step": 9, "seed": seed,
        "guidance": {f"kappa{k}": kappa for k in range(1, 5)}} | changes}


def table(out):
    return list(csv.DictReader((out / "table.csv").open()))


def test_seeds_become_an_interval(tmp_path):
    """Three students that differ in the seed of their training alone; numpy and scipy on the three numbers."""
    fids = [8.7, 9.1, 8.9]
    for seed, fid in enumerate(fids):
        write(tmp_path / "r", f"s{seed}", fid, 0.3 + 0.001 * seed, student(1.5, seed))
    assert cli.main(["compare", str(tmp_path / "r"), "--out", str(tmp_path / "out")]) == 0
    (row,) = table(tmp_path / "out")
    low, high = stats.t.interval(0.95, 2, np.mean(fids), stats.sem(fids))
    assert [float(row[k]) for k in ("fid", "fid_low", "fid_high")] == pytest.approx([np.mean(fids), low, high])
    assert (row["seed sets"], row["guidance"]) == ("3", "1.5")
    assert "| 8.90 ± 0.50 |" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.parametrize("value, interval, text", [
    (0.97, (0.9154, 0.9897), "0.970 (0.915 to 0.990)"), (0.5, (0.4038, 0.5962), "0.500 ± 0.096"),
    (0.618, (0.5875, 0.6476), "0.618 (0.588 to 0.648)"), (1.0, (0.963, 1.0), "1.000 (0.963 to 1.000)"),
    (8.9, (8.4032, 9.3968), "8.90 ± 0.50"), (2.0, (2.0, 2.0), "2.0000 ± 0.0000")], ids=str)
def test_intervals_are_shown_as_they_are(value, interval, text):
    """As ± where both halves are alike to the digits shown, otherwise from where to where."""
    assert _number((value, interval)) == text


@pytest.mark.parametrize("others, rows", [
    ([("b", student(1.5, 0), 100)], 1), ([("b", student(1.5, 0), 50)], 2), ([("b", student(2.0, 1), 100)], 2),
    ([("b", student(1.5, 1, inputs={"model.teacher": "other"}), 0)], 2), ([("b", student(1.5, 1, step=8), 0)], 2),
    ([("b", student(1.5, 1, settings="y"), 0)], 2),
    ([("b", {"sha256": "x"}, 0), ("c", {"sha256": "x"}, 100)], 2), ([("b", {"sha256": "x", "guidance": 2.0}, 0),
     ("c", {"sha256": "x"}, 100)], 3)],
    ids=["other noise", "noise shared in part", "guidance", "changed teacher", "step", "settings",
         "plain model", "its guidance"])
def test_what_is_taken_together(tmp_path, others, rows):
    """Only results that differ in seeds, and share no image."""
    write(tmp_path / "r", "a", 1.0, 0.3, student(1.5, 0))
    for name, model, first in others:
        write(tmp_path / "r", name, 2.0, 0.4, model, first)
    found = read_groups([str(tmp_path / "r")])
    assert len(found) == rows and sum(group.runs() for group in found) == 1 + len(others)


def test_curves(tmp_path):
    """Points of one curve are joined in the order of guidance, with their intervals."""
    for n, kappa in enumerate((3.0, 1.0, 10.0, 1.5)):
        for seed in (0, 1):
            write(tmp_path / "s", f"k{kappa}-{seed}", 10 - n + seed, 0.3 + 0.01 * n, student(kappa, seed))
        write(tmp_path / "t", f"t{kappa}", 5 - n, 0.35 + 0.01 * n, {"sha256": "t", "guidance": kappa}, 0,
              {"clip_score": [0.34 + 0.01 * n, 0.36 + 0.01 * n]})
    args = [f"student={tmp_path / 's'}", f"teacher={tmp_path / 't'}", "--out", str(tmp_path / "out")]
    assert cli.main(["compare", *args]) == 0
    rows = table(tmp_path / "out")
    assert [row["curve"] for row in rows] == ["student"] * 4 + ["teacher"] * 4
    assert "<!-- teacher -->" in (tmp_path / "out" / "fid-clip-score.svg").read_text()
    axes = Figure().add_subplot()
    _curve(axes, read_groups([args[1]]), "fid", "teacher")
    assert [t.get_text() for t in axes.texts] == ["1", "1.5", "3", "10"]
    (line,) = axes.lines[:1]
    assert list(line.get_ydata()) == [4, 2, 5, 3] and list(line.get_xdata()) == pytest.approx([0.36, 0.38, 0.35, 0.37])
    (bars,) = axes.collections[:1]
    assert bars.get_segments()[0][:, 0] == pytest.approx([0.35, 0.37])       # the interval of the CLIP score


def test_what_does_not_compare_is_said(results, tmp_path):
    other = json.loads(results[0].read_text())
    other |= {"images": 5000, "metrics": {"fid_small_clip": 2.0, "clip_score": 0.9}}
    (tmp_path / "other.json").write_text(json.dumps(other))
    out = tmp_path / "out"
    assert cli.main(["compare", str(results[0]), str(tmp_path / "other.json"), "--out", str(out)]) == 0
    assert "Image count: differs" in (out / "table.md").read_text()
    assert (out / "fid-clip-score.svg").exists() and (out / "fid-small-clip-clip-score.svg").exists()


@pytest.mark.parametrize("content, words", [(None, "no such file"), ("{", "no result"), ('{"a": 1}', "no result"),
                                            ("[" * 100_000, "no result"), ('{"metrics": {}}', "no result"),
                                            ('{"model": {}, "images": 9, "prompts": {"sha256": "a"}, "metrics": '
                                             '{"fid": NaN}}', "no result")],
                         ids=["missing", "not JSON", "other JSON", "deep", "empty", "not finite"])
def test_no_results(results, tmp_path, capsys, content, words):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    assert cli.main(["compare", str(results[0]), str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("sidfast: ") and "x.json" in error and words in error and "\n" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [
    {"prompts": {"sha256": []}}, {"reference": {"sha256": {}}}, {"clip": 3}, {"model": []}, {"images": "9"},
    {"seeds": 3}, {"seeds": {"first": "a", "last": 2}}, {"intervals": []}, {"intervals": {"fid": ["a", "b"]}},
    {"repeats": 3}, {"model": {"distillation": {"guidance": 3}}}, {"model": {"sha256": []}}],
    ids=lambda v: str(v).replace("'", ""))
def test_results_with_something_else_in_place(results, tmp_path, capsys, change):
    (tmp_path / "x.json").write_text(json.dumps(json.loads(results[0].read_text()) | change))
    assert cli.main(["compare", str(tmp_path / "x.json"), str(results[1]), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert "is no result" in error and "\n" not in error and not (tmp_path / "out").exists()


def test_arguments(results, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for args, words in (([str(results[0])] * 2, "student.json: is given twice"),
                        ([str(tmp_path / "empty")], "no result (*.json) in it")):
        assert cli.main(["compare", *args, "--out", str(tmp_path / "out")]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("out, words", [("", "is empty"), (".", "must name a file or folder"),
                                        ("/", "must name a file or folder")])
def test_out_needs_a_name(results, capsys, out, words):
    assert cli.main(["compare", str(results[0]), "--out", out]) == 2
    assert words in capsys.readouterr().err


NAMES = ["=cmd|x", "-1 b", "@a", "$\\frac{$", "_hidden", "<script>", "a`b*c[d]", "line\nend", "x" * 200, "plain"]


def test_names_that_others_chose(tmp_path):
    """They end no cell and bring no HTML, are no formula for a spreadsheet and no mathematics in a plot, and none is
    missing in its legend. Numbers stay numbers."""
    for n, name in enumerate(NAMES):
        write(tmp_path / "r", name, -1.0 - n, 0.3, {"sha256": str(n)})
    out = tmp_path / "out"
    assert cli.main(["compare", f"$ |={tmp_path / 'r'}", "--out", str(out)]) == 0
    found = table(out)
    assert {row["curve"] for row in found} == {"$ |"} and {float(row["fid"]) for row in found} == {
        -1.0 - n for n in range(len(NAMES))}
    assert {row["result"] for row in found} == {f"'{name}" if name[0] in "=-@" else name for name in NAMES}
    _, _, *rows = (out / "table.md").read_text().splitlines()
    assert len(rows) == len(NAMES) and all(len(re.split(r"(?<!\\)\|", row)) == 10 for row in rows)
    text = "\n".join(rows)
    assert all(part in text for part in (r"=cmd\|x", "&lt;script>", r"a\`b\*c\[d\]", r"line\\nend", r"$ \|"))
    assert cli.main(["compare", str(tmp_path / "r"), "--out", str(out)]) == 0
    drawn = (out / "fid-clip-score.svg").read_text()
    ElementTree.fromstring(drawn)
    assert all(f"<!-- {shown} -->" in drawn for shown in ("$\\frac{$", " _hidden", "&lt;script&gt;", "line\\nend"))
    assert "x" * 61 not in drawn


@pytest.mark.parametrize("metrics, words", [
    ({"fid/../../../x": 1.0}, "metrics.fid/../../../x"), ({"fid": 1e31}, "metrics.fid"), ({"fid": True}, "metrics.fid"),
    ({"fid": 10**400}, "metrics.fid"), ({"": 1.0}, "metrics."), ({"fid\n": 1.0}, "metrics.fid")], ids=str)
def test_metrics_that_are_none(results, tmp_path, capsys, metrics, words):
    """Plots are called after metrics, so their names are no paths."""
    (tmp_path / "x.json").write_text(json.dumps(json.loads(results[0].read_text()) | {"metrics": metrics}))
    before = sorted(tmp_path.iterdir())
    assert cli.main(["compare", str(tmp_path / "x.json"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "x.json: is no result of `sidfast evaluate` (" in error and words.encode("unicode_escape").decode() in error
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("fids", [(9e29, -9e29), (5e-324, 0.0), (1.0, 1.0 + 2e-16)], ids=str)
def test_extreme_numbers_are_drawn(tmp_path, fids):
    """Also with an interval that does not hold its value."""
    for n, fid in enumerate(fids):
        write(tmp_path / "r", str(n), fid, -fid, {"sha256": str(n)}, 0, {"clip_score": [0.2, 0.3]})
    assert cli.main(["compare", str(tmp_path / "r"), "--out", str(tmp_path / "out")]) == 0
    assert Image.open(tmp_path / "out" / "fid-clip-score.png").size[0] > 900


def test_files_in_their_order(tmp_path):
    """Numbers in names count as such, wherever they stand; other digits are letters."""
    names = ["1a", "9", "10", "10b", "a1", "a2", "a10", "a10.5", "²", "٣"]
    for n, name in enumerate(reversed(names)):
        write(tmp_path / "r", name, 1.0, 0.3, {"sha256": str(n)})
    assert [group.name for group in read_groups([str(tmp_path / "r")])] == names


def test_out_that_is_in_the_way(results, tmp_path, capsys):
    """A folder called table.md, a link under a temporary name: nothing is lost, nothing is written elsewhere."""
    out = tmp_path / "out"
    (out / "table.md").mkdir(parents=True)
    assert cli.main(["compare", str(results[0]), "--out", str(out)]) == 2
    assert "table.md is a folder there" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["table.md"]
    (tmp_path / ".other.partial").symlink_to(out)
    assert cli.main(["compare", str(results[0]), "--out", str(tmp_path / "other")]) == 0
    assert [p.name for p in out.iterdir()] == ["table.md"] and (tmp_path / "other" / "table.md").is_file()
