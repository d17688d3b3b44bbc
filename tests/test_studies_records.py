"""What a study's runs leave behind, where it is incomplete, damaged, or written by someone else."""

import json

import pytest
import torch
from test_studies import fails, results, study_file  # noqa: F401 (fixtures)

from sidfast.studies.plots import plots
from sidfast.studies.record import read_record
from sidfast.studies.results import interval
from sidfast.studies.study import read_study
from sidfast.studies.table import markdown
from sidfast.studies.worker import Worker


def test_numbers_that_are_missing(results):  # noqa: F811
    """A seed or a point of the teacher without one of two metrics (null: it was not finite) is not drawn."""
    numbers = json.loads(json.dumps(results[0]))
    numbers["variants"]["b"]["runs"]["0"]["metrics"]["fid_small_clip"] = None
    del numbers["variants"]["a"]["runs"]["1"]["metrics"]["clip_score"]
    whole = {"clip_score": interval([0.4]), "fid_small_clip": interval([1.0])}
    numbers["teacher"] = [{"guidance": 1.0, "summary": {"clip_score": interval([0.3])}},
                          {"guidance": 2.0, "summary": whole}]
    [axes] = plots(numbers)["fid-clip"].axes
    assert [text.get_text() for text in axes.texts] == ["2"]
    assert sum(line.get_marker() == "." for line in axes.lines) == 3 + 2         # of four and three seeds that ended


def test_sets_of_the_teacher_with_other_metrics(tmp_path, study_file):  # noqa: F811
    """Only metrics that all sets of noise have count."""
    from sidfast.studies.record import write_outcome
    from sidfast.studies.results import collect

    study = read_study(study_file(teacher=[1.5]))
    write_outcome(tmp_path, study.teacher[0], "done", None, metrics={"accuracy": 0.5}, repeats=[
        {"accuracy": 0.4, "fid": 1.0, "kid": None}, {"kid": 1.0, "accuracy": 0.6, "fid": None}])
    [point] = collect(study, tmp_path)["teacher"]
    assert point["summary"] == {"accuracy": interval([0.4, 0.6])}


@pytest.mark.parametrize("lines, status", [
    (['{"step": 8, "images": 32, "images_per_s": null, "peak_gib": null, "seconds/evaluation": null}'], "done"),
    (['{"step": 8, "images": "32"}', '{"step": 9}'], "failed")], ids=["null", "damaged"])
def test_metrics_of_a_run(study_file, tmp_path, monkeypatch, lines, status):  # noqa: F811
    """What is not known counts as nothing; a file that is damaged fails the run, and its record names the line."""
    study = read_study(study_file())
    run, worker = study.runs[0], Worker(study, tmp_path / "out", 1, torch.device("cpu"))
    (tmp_path / "out" / run.folder).mkdir(parents=True)
    (tmp_path / "out" / run.folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(worker, "_train", lambda run: {"accuracy": 0.5})
    monkeypatch.setattr("sidfast.studies.worker._strip", lambda *_: None)
    worker._run(run)
    record, cost = (read_record(tmp_path / "out", run, name) for name in ("result.json", "cost.json"))
    assert (record["status"], cost["training_s"], cost["peak_gib"]) == (status, 0, None)
    assert (record["message"] or "").endswith("or remove it") == (status == "failed")


@pytest.mark.parametrize("name, content, words", [
    ("result.json", '{"status": "finished"}', "status"), ("result.json", "[]", "must be a section"),
    ("result.json", '{"status": "done", "message": null, "metrics": {"a/b": 1}, "curve": [], "config": {}, '
     '"evaluation": {}}', "metrics.a/b"), ("config.json", '{"config": 3}', "config"), ("result.json", "\xff", "UTF-8")])
def test_damaged_record(capsys, study_file, tmp_path, name, content, words):  # noqa: F811
    folder = tmp_path / "out" / "runs" / "a" / "seed-0"
    folder.mkdir(parents=True)
    (folder / name).write_bytes(content.encode("latin-1"))
    line = fails(capsys, study_file(), "--out", tmp_path / "out")
    assert f"a/seed-0/{name}: is damaged (" in line and words in line and "remove it to run this again" in line
    assert [p.name for p in tmp_path.rglob("out/**/*") if p.is_file()] == [name]


def test_texts_that_others_wrote(results):  # noqa: F811
    """A device, a message or a question ends no row of the table and brings no HTML."""
    numbers, costs, _ = json.loads(json.dumps(results))
    numbers["question"], numbers["study"] = "What <b>is</b> it?\nThat.", "a|b"
    numbers["variants"]["c"]["runs"]["0"]["message"] = "<img src=x>\n| row |"
    costs["a"]["0"]["device"] = "<script>|"
    text = markdown(numbers, costs)
    assert text.startswith("# a\\|b\n\nWhat &lt;b>is&lt;/b> it?\nThat.\n") and "<" not in text
    assert r"(&lt;img src=x>\\n\| row \|)" in text and text.count("\n| ") == 4
