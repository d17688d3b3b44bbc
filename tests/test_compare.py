"""`sidfast compare`: the table, the plot and the paper's points."""

import csv
import json
from xml.etree import ElementTree

import pytest
from PIL import Image

from sidfast import cli


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


def test_table_and_plot(results, tmp_path):
    out = tmp_path / "out"
    assert cli.main(["compare", *map(str, results), "--out", str(out), "--paper"]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["fid-clip-score.png", "fid-clip-score.svg", "table.csv",
                                                     "table.md"]
    rows = list(csv.DictReader((out / "table.csv").open()))
    assert [(r["result"], r["steps"], r["fid"], r["clip_score"]) for r in rows] == [
        ("student", "1", "9.123456", "0.3012"), ("teacher", "50", "8.5", "0.31")]
    table = (out / "table.md").read_text()
    assert "| student | 30000 | 1 |  | 9.123 | 0.3012 |" in table and "do not compare" not in table
    assert Image.open(out / "fid-clip-score.png").size[0] > 900
    svg = ElementTree.parse(out / "fid-clip-score.svg")
    hollow = [e for e in svg.iter("{http://www.w3.org/2000/svg}use") if "fill: none" in e.get("style", "")
              or "fill-opacity: 0" in e.get("style", "")]
    assert len(hollow) >= 9                              # the paper's nine points


def test_what_does_not_compare_is_said(results, tmp_path):
    other = json.loads(results[0].read_text())
    other |= {"images": 5000, "metrics": {"fid_small_clip": 2.0, "clip_score": 0.9}}
    (tmp_path / "other.json").write_text(json.dumps(other))
    out = tmp_path / "out"
    assert cli.main(["compare", str(results[0]), str(tmp_path / "other.json"), "--out", str(out)]) == 0
    assert "Image count: differs" in (out / "table.md").read_text()
    assert (out / "fid-clip-score.svg").exists() and (out / "fid-small-clip-clip-score.svg").exists()


@pytest.mark.parametrize("content, words", [(None, "no such file"), ("{", "no result"), ('{"a": 1}', "no result")])
def test_no_results(results, tmp_path, capsys, content, words):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    assert cli.main(["compare", str(results[0]), str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("sidfast: ") and "x.json" in error and words in error and "\n" not in error
    assert not (tmp_path / "out").exists()
