"""`sidfast ablate`: study files, statistics, tables and plots."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from scipy import stats

from sidfast import cli
from sidfast.accel import plan as speed
from sidfast.common.errors import UserError
from sidfast.studies import ablate
from sidfast.studies.plots import plots
from sidfast.studies.record import is_final, read_record, reserved
from sidfast.studies.results import interval, metric_names
from sidfast.studies.study import Run, load_study, read_study
from sidfast.studies.table import label, markdown
from sidfast.studies.worker import Worker
from sidfast.training import preflight

STUDIES = sorted((ROOT / "configs" / "ablations").rglob("*.json"))


# The studies that are shipped


def test_all_studies_are_shipped():
    names = {"noise_schedule", "synthetic_diversity", "synthetic_quality", "guidance", "updates", "kernels"}
    assert {p.relative_to(ROOT / "configs" / "ablations").with_suffix("").as_posix() for p in STUDIES} == names | {
        f"sd15/{name}" for name in names - {"updates", "kernels"}}


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.relative_to(ROOT / "configs" / "ablations").as_posix())
def test_shipped_study_loads(path):
    runs, study = load_study(path), read_study(path)
    assert len(runs) == len(study.file.variants) * len(study.file.seeds) and len(study.file.seeds) >= 3
    assert len({name for name, _ in runs}) == len(runs)
    first = [config for name, config in runs if name.endswith("seed-0")]
    assert len({config.model_dump_json() for config in first}) == len(first), "two variants are the same"
    assert study.file.variants[study.reference] == {}
    shapes = "sd15" not in path.parts
    for _, config in runs:
        assert config.train.images == study.file.images and config.train.steps is None
        assert (config.evaluation.images > 0) == shapes == config.data.prompts.startswith("shapes:")
    assert [config.train.seed for _, config in runs[::len(first)]] == study.file.seeds


def test_noise_schedule_has_every_density_everywhere():
    from sidfast.method.densities import DENSITIES

    runs = dict(load_study(ROOT / "configs" / "ablations" / "noise_schedule.json"))
    seen = {(config.noise.levels("fake_score")[0], config.noise.levels("generator")[0]) for config in runs.values()}
    others = set(DENSITIES) - {"ddpm"}
    assert seen == {("ddpm", "ddpm")} | {(d, "ddpm") for d in others} | {("ddpm", d) for d in others} | {
        (d, d) for d in others}
    assert {config.noise.t_init for config in runs.values()} == {500, 625, 750, 875}


# Study files


@pytest.fixture
def study_file(tmp_path, tiny_config):
    """study_file(**changes) -> the path of a study's file; a change to None removes a key."""
    (tmp_path / "base.json").write_text(json.dumps(tiny_config))

    def write(text=None, **changes):
        values = {"question": "?", "base": "base.json", "images": 32, "seeds": [0, 1],
                  "variants": {"a": {}, "b": {"noise.density": "edm"}}, "evaluation": {"images": 130}} | changes
        path = tmp_path / "study.json"
        path.write_text(text or json.dumps({k: v for k, v in values.items() if v is not None}))
        return path

    return write


def fails(capsys, *args):
    """Run `sidfast ablate`, which must refuse; returns its line."""
    assert cli.main(["ablate", *map(str, args)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("sidfast: "), lines
    return lines[0]


@pytest.mark.parametrize("changes, words", [
    ({"vriants": {}}, ["unknown key vriants", "variants"]),
    ({"base": "none.json"}, ["none.json: no such file"]),
    ({"base": None}, ["base is missing"]),
    ({"seeds": []}, ["seeds"]), ({"seeds": None}, ["seeds is missing"]), ({"seeds": [1, 1]}, ["seeds", "twice"]),
    ({"seeds": [-1]}, ["seeds", "negative"]), ({"variants": {}}, ["variants"]), ({"images": 0}, ["images"]),
    ({"variants": {"a": {"noise.densty": "edm"}}}, ["variants.a", "unknown key noise.densty", "noise.density"]),
    ({"variants": {"a": {"noise.density": "edn"}}}, ["variants.a", "noise.density", "'edn'"]),
    ({"variants": {"a": {"guidance": 3}}}, ["variants.a", "guidance"]),
    ({"variants": {"a": {"data.prompts.x": 3}}}, ["variants.a", "prompts is not a section"]),
    ({"variants": {"a": {"noise.": 3}}}, ["variants.a", "'noise.'"]),
    ({"variants": {"a b/c": {}}}, ["'a b/c'"]),
    ({"reference": "c"}, ["reference", "'c'"]),
    ({"teacher": ["high"]}, ["teacher"]),
    ({"variants": {"a": {"train.seed": 3}}}, ["variants.a", "train.seed", "seeds"]),
    ({"settings": {"train.steps": 3}}, ["settings", "train.steps", "images"]),
    ({"settings": {"evaluation.images": 3}}, ["settings", "evaluation"]),
    ({"settings": {"train.save_every": 0}}, ["train.save_every"]),
    ({"evaluation": {"imges": 3}}, ["unknown key evaluation.imges", "evaluation.images"]),
    ({"evaluation": {"clip": "folder"}}, ["evaluation.clip", "shapes world"]),
    ({"evaluation": {"assets": "/nowhere"}}, ["evaluation.assets", "/nowhere"]),
    ({"evaluation": {"images": 100}}, ["evaluation.images", "100 are too few"]),
    ({}, ["the images are 16 x 16, those of the reference 64 x 64"]),            # the tiny teacher's
    ({"settings": {"model.teacher": "/nowhere"}}, ["model.teacher", "/nowhere"]),
    ({"variants": {"a": {"noise.t_init": 5000}}}, ["variants.a", "noise.t_init (5000)"]),
    ({"variants": {"a": {}, "b": {"model.teacher": "other"}}}, ["the same model.teacher"]),
    ({"variants": {"a": {}, "b": {"model.variant": "fp16"}}}, ["the same model.teacher"]),
    ({"settings": {"model.prediction_type": "epsilon"}, "teacher": [1.5]}, ["without model.scheduler"]),
    ({"variants": {"a": {"speed.fused": True}}, "settings": {"deepspeed.bf16": {"enabled": True},
                                                             "deepspeed.fp16": {"enabled": True}}}, ["bf16 and fp16"]),
], ids=str)
def test_bad_study(capsys, study_file, tmp_path, changes, words):
    line = fails(capsys, study_file(**changes), "--out", tmp_path / "out")
    assert all(word in line for word in words), line
    assert not (tmp_path / "out").exists()


def test_configuration_that_is_no_study(capsys, tmp_path):
    line = fails(capsys, ROOT / "configs" / "ddpm.json", "--out", tmp_path / "out")
    assert "ddpm.json: is no study (docs/ablations.md) but a configuration" in line


def test_two_variants_of_one_name(capsys, study_file, tmp_path):
    text = study_file().read_text().replace('"b":', '"a":')
    assert "'a' is given twice" in fails(capsys, study_file(text), "--out", tmp_path / "out")


def test_no_file_no_json_no_jobs(capsys, study_file, tmp_path):
    assert "no such file" in fails(capsys, tmp_path / "none.json")
    assert "line 1: not JSON" in fails(capsys, study_file("{"))
    for jobs in ("0", str(10**30)):
        assert "--jobs" in fails(capsys, study_file(), "--jobs", jobs, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("names", [["thesis.tex"], ["logs/x.log", "results.json"], ["src/a.py", "runs/a/b"]], ids=str)
def test_folder_that_is_no_study(capsys, study_file, tmp_path, names):
    out = tmp_path / "out"
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("x")
    before = sorted(out.rglob("*"))
    assert "holds no study" in fails(capsys, study_file(), "--out", out)
    assert sorted(out.rglob("*")) == before
    assert "is no folder" in fails(capsys, study_file(), "--out", out / names[0] / "x")
    assert "written to /proc" in fails(capsys, study_file(), "--out", "/proc/x")


@pytest.mark.parametrize("names", [[], ["logs/worker-0.log", "notes.txt"], ["runs/a/x", "teacher/y", "logs/z"],
                                   ["costs.json", "table.md", "thesis.tex"]], ids=str)
def test_folder_of_a_study(study_file, tmp_path, names, monkeypatch):
    """A study that was begun, or is done, goes on; it may have company."""
    for name in names:
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("x")
    monkeypatch.setattr(preflight, "check_measures", lambda *_: None)              # (of a teacher of 16 x 16 pixels)
    monkeypatch.setattr(ablate, "_work", lambda *_: None)
    monkeypatch.setattr(ablate, "write_results", lambda *_: None)
    assert cli.main(["ablate", str(study_file()), "--out", str(tmp_path / "out")]) == 1


@pytest.mark.parametrize("setting", [{"speed.fused": True}, {"speed.cuda_graphs": True}, {"speed.attention": "flash"}])
def test_speed_that_needs_a_gpu(capsys, study_file, tmp_path, setting, monkeypatch):
    monkeypatch.setattr(speed, "INTERPRETED", False)
    monkeypatch.setattr(speed.torch.cuda, "is_available", lambda: False)
    line = fails(capsys, study_file(variants={"a": {}, "b": setting}), "--out", tmp_path / "out")
    assert next(iter(setting)) in line and "there is no GPU here" in line
    assert not (tmp_path / "out").exists()


def test_a_section_that_deepspeed_does_not_take(capsys, study_file, tmp_path):
    """Of any variant, and before the first run."""
    variants = {"a": {}, "b": {"deepspeed.zero_optimization.stage": 9}}
    line = fails(capsys, study_file(variants=variants), "--out", tmp_path / "out")
    assert "deepspeed.zero_optimization.stage: " in line
    assert not (tmp_path / "out").exists()


def test_prompts_of_a_file_need_an_evaluation(capsys, study_file, tmp_path):
    (tmp_path / "p.txt").write_text("a\n")
    settings = {"data.prompts": str(tmp_path / "p.txt")}
    assert "evaluation.coco or evaluation.prompts" in fails(capsys, study_file(settings=settings))
    measures = {"prompts": str(tmp_path / "p.txt"), "points": 2}
    assert "evaluation.points" in fails(capsys, study_file(settings=settings, evaluation=measures))
    measures = {"prompts": str(tmp_path / "p.txt"), "metrics": "fid", "reference": str(tmp_path)}
    assert "evaluation.features is missing; fid" in fails(capsys, study_file(settings=settings, evaluation=measures))
    measures["features"] = "resnet:file"
    assert "evaluation.features: must be" in fails(capsys, study_file(settings=settings, evaluation=measures))
    measures["features"] = "inception:/nowhere.pth"
    line = fails(capsys, study_file(settings=settings, evaluation=measures), "--out", tmp_path / "out")
    assert "evaluation.features: /nowhere.pth" in line
    (tmp_path / "t.csv").write_text("a,b\nx,y\n")
    table = {"prompts": str(tmp_path / "t.csv"), "metrics": "clip", "clip": str(tmp_path)}
    line = fails(capsys, study_file(settings=settings, evaluation=table), "--out", tmp_path / "out")
    assert "evaluation.prompts: " in line and "give one as " in line and line.endswith("evaluation.prompts_column")
    measures = {"coco": str(tmp_path), "prompts_column": "a", "metrics": "clip", "clip": str(tmp_path)}
    assert "evaluation.prompts_column is of" in fails(capsys, study_file(settings=settings, evaluation=measures))
    assert not (tmp_path / "out").exists()


def test_runs_of_a_study(study_file):
    study = read_study(study_file(settings={"loss.alpha": 0.5}, evaluation={"images": 130, "points": 3}))
    assert [(run.variant, run.seed) for run in study.runs] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert study.reference == "a" and study.runs[3].folder == Path("runs/b/seed-1")
    config = study.runs[3].config
    assert (config.loss.alpha, config.noise.density, config.train.seed, config.train.total_steps) == (0.5, "edm", 1, 8)
    assert config.evaluation.every == 2


def test_a_run_belongs_to_one_process(tmp_path, study_file):
    run = read_study(study_file()).runs[0]
    with reserved(tmp_path, run) as first, reserved(tmp_path, run) as second:
        assert first and not second
    with reserved(tmp_path, run) as again:
        assert again


def test_a_run_that_another_study_has_begun_meanwhile(tmp_path, study_file, monkeypatch):
    """Both were started before either had written anything."""
    study, other = read_study(study_file()), read_study(study_file(settings={"loss.alpha": 0.5}))
    folder = tmp_path / study.runs[0].folder
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"config": other.runs[0].config.model_dump()}))
    worker = Worker(study, tmp_path, 1, torch.device("cpu"))
    monkeypatch.setattr(worker, "_run", lambda run: pytest.fail("it was trained"))
    monkeypatch.setattr(worker, "_measure_teacher", lambda point: None)
    with pytest.raises(UserError, match=r"holds a, seed 0, of another study \(loss.alpha is 0.5 there"):
        worker.work()
    assert [path.name for path in folder.iterdir()] == ["config.json"]


# Statistics


def test_interval_is_student_s():
    values = [3.1, 2.7, 3.9, 3.3]
    got, want = interval(values), stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert got["n"] == 4 and got["mean"] == pytest.approx(sum(values) / 4)
    assert (got["low"], got["high"]) == pytest.approx((want.low, want.high))
    assert interval([2.0]) == {"mean": 2.0, "low": None, "high": None, "n": 1}
    assert interval([1.0, 3.0])["high"] == pytest.approx(2 + 12.7062 * 1)        # t of 1 degree of freedom, by table


@pytest.fixture
def results(tmp_path, study_file):
    """A study's results with invented numbers; of variant b one seed diverged, of c all failed."""
    from sidfast.studies.record import COST, write_record
    from sidfast.studies.results import collect, costs

    study = read_study(study_file(seeds=[0, 1, 2, 3], variants={"a": {}, "b": {"noise.density": "edm"}, "c": {
        "noise.density": "karras"}}))
    fid = {"a": [3.0, 2.0, 4.0, 3.5], "b": [2.1, 1.2, 3.4, math.nan], "c": [0.0] * 4}
    for run in study.runs:
        value = fid[run.variant][run.seed]
        status = "failed" if run.variant == "c" else "diverged" if math.isnan(value) else "done"
        metrics = {"images": 130, "fid_small_clip": value, "clip_score": 0.3 + value / 100, "accuracy": 0.5,
                   "accuracy_size": 0.7} if status == "done" else None
        write_record(tmp_path / "out", study, run, status, None if metrics else "a reason", metrics,
                     [(16, {"fid_small_clip": 9.0}), (32, metrics)] if metrics else [])
        (tmp_path / "out" / run.folder / COST).write_text(json.dumps({
            "training_s": 10.0 + run.seed, "wall_s": 12.0, "runs_at_once": 2, "device": "CPU", "peak_gib": None}))
    return collect(study, tmp_path / "out"), costs(study, tmp_path / "out"), fid


def test_signal_as_a_run_ends(study_file, tmp_path, monkeypatch):
    """Its result is kept, and no other run begins."""
    study = read_study(study_file(seeds=[0, 1]))
    worker = Worker(study, tmp_path / "out", 1, torch.device("cpu"))

    def train(run):
        worker.stopped = "SIGTERM"
        return {"accuracy": 0.5}

    monkeypatch.setattr(worker, "_train", train)
    monkeypatch.setattr("sidfast.studies.worker._strip", lambda *_: None)
    with pytest.raises(SystemExit):
        worker.work()
    assert [is_final(read_record(tmp_path / "out", run)) for run in study.runs][:2] == [True, False]


def test_difference_is_paired(results):
    numbers, _, fid = results
    a, b = fid["a"][:3], fid["b"][:3]
    got, want = numbers["variants"]["b"]["difference"]["fid_small_clip"], stats.ttest_rel(b, a).confidence_interval()
    assert got["n"] == 3 and (got["low"], got["high"]) == pytest.approx((want.low, want.high))
    assert numbers["variants"]["a"]["difference"] == {} and numbers["variants"]["a"]["summary"]["accuracy"]["n"] == 4
    assert numbers["variants"]["c"]["summary"] == {}
    assert metric_names(numbers) == ["fid_small_clip", "clip_score", "accuracy"]


def test_table_says_what_was_left_out(results):
    numbers, costs, _ = results
    text = markdown(numbers, costs)
    row = next(line for line in text.splitlines() if line.startswith("| b "))
    assert "3/4, 1 diverged" in row and "| 2.2 ± 2.7 | **-0.77 ± 0.38** |" in row
    assert "b, seed 3: diverged (a reason)" in text and "c, seed 0: failed (a reason)" in text
    first = next(line for line in text.splitlines() if line.startswith("| a "))
    assert first.endswith("| 6 |")                       # 10, 11, 12, 13 seconds, two runs at once
    assert "FID (small CLIP)" in text and "CPU-seconds" in text
    assert [label(m) for m in ("kid_clip", "fid", "clip_score")] == ["KID (CLIP)", "FID", "CLIP score"]


def test_plots(results):
    from sidfast.evaluation.charts import encode

    figures = plots(results[0])
    assert set(figures) == {"fid-clip", *(f"{metric}-{kind}" for metric in ("fid-small-clip", "clip-score", "accuracy")
                                          for kind in ("images", "variants"))}
    assert encode(figures["fid-clip"], "png")[:4] == b"\x89PNG"
    [axes] = figures["fid-small-clip-images"].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines == {"a": [[16, 9], [32, pytest.approx(3.125)]], "b": [[16, 9], [32, pytest.approx(6.7 / 3)]]}
    [axes] = figures["fid-small-clip-variants"].axes     # (of "c", nothing ended)
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b"]
    for row, (bar, name) in enumerate(zip(axes.containers, "ab", strict=True)):
        assert bar[0].get_xydata().tolist() == [[pytest.approx(results[0]["variants"][name]["summary"][
            "fid_small_clip"]["mean"]), row]]
    left, right = axes.get_xlim()
    assert left < 1.2 and right > 4.0
    ends = [results[0]["variants"][name]["summary"]["fid_small_clip"] for name in "ab"]
    arrows = {(line.get_marker(), line.get_ydata()[0]) for line in axes.lines if line.get_marker() in ("<", ">")}
    assert arrows == {("<", row) for row, end in enumerate(ends) if end["low"] < left} | {
        (">", row) for row, end in enumerate(ends) if end["high"] > right}
    assert ("<", 1) in arrows                            # (2.2 less 2.7)


def test_teacher_stands_beside_its_students(results):
    """A line through its points, in the order of guidance."""
    summary = {"fid_small_clip": interval([1.0, 2.0]), "clip_score": interval([0.3, 0.4])}
    points = [{"guidance": g, "summary": summary} for g in (1, 1.5)]
    [axes] = plots(results[0] | {"teacher": points})["fid-clip"].axes
    assert [text.get_text() for text in axes.texts] == ["1", "1.5"]
    [line] = [c for c in axes.containers if c.get_label() == "teacher, 50 steps"]
    assert line[0].get_xydata().tolist() == [[pytest.approx(0.35), 1.5]] * 2


def test_interface_for_plans(study_file):
    names, configs = zip(*load_study(study_file()), strict=True)
    assert names == ("a/seed-0", "b/seed-0", "a/seed-1", "b/seed-1") and configs[1].noise.density == "edm"
    assert isinstance(read_study(study_file()).runs[0], Run)
