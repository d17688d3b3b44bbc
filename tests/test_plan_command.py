"""`sidfast plan` as a command: what it recommends, says and refuses, for a run and for a study."""

import json
import re
import shlex

import pytest
from conftest import ROOT
from helpers_input import fails

from sidfast import cli
from sidfast.config.schema import build_config, load_config
from sidfast.engines.engine import ENGINES, engine_section, offloads, zero_stage
from sidfast.planning import memory, plan_text, planner
from sidfast.planning.plan import measured_throughput, parse_memory, parse_throughput
from sidfast.planning.planner import GIB, Option, Planner, recommend
from sidfast.teachers.load import load_meta_teacher

MEASURE = Planner._measure


def option(stage, micro_batch, size, checkpointing=False, offload=False, label=None):
    return Option(label or str(stage), stage, offload, micro_batch, checkpointing, size * GIB, {}, 0, 1)


def test_recommendation():
    options = [option(1, 4, 20), option(1, 8, 30), option(2, 16, 21), option(1, 16, 20, True),
               option(3, 8, 5, True, True, "3, offload"), option(1, 64, 10)]
    assert recommend(options, 40 * GIB) is options[1]
    assert recommend(options, 23 * GIB) is options[0]    # ten per cent are left for what is not counted
    assert recommend(options[1:], 23 * GIB) is options[3]
    assert recommend(options, 6 * GIB) is options[4] and recommend(options, 5 * GIB) is None


@pytest.fixture(scope="module")
def measured_once():
    """The same updates are counted once for all tests of this file that plan whole runs."""
    known = {}

    def measured(self, checkpointing, names):
        key = (checkpointing, *names, self.dtype, self.latent_shape,
               *(value.shape for value in self.teacher.conditions(1).values()), self.fused,
               self.teacher.schedule.prediction_type, self.teacher.network.to_json_string(),
               self.config.guidance.model_dump_json(),
               self.config.loss.alpha)
        if key not in known:
            known[key] = MEASURE(self, checkpointing, names)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Planner, "_measure", measured)
        yield


def planned(capsys, *args):
    """What `sidfast plan` prints, and the arguments of the --set options that it recommends."""
    assert cli.main(["plan", *map(str, args)]) == 0
    text = capsys.readouterr().out
    line = next(line for line in text.splitlines() if "--set train.micro_batch" in line)
    return text, shlex.split(line[line.index("--set"):])


def test_the_recommended_settings_are_valid(capsys, write_config, measured_once):
    config = write_config()
    text, settings = planned(capsys, "--config", config, "--memory", "24G", "--throughput", "10 images/s", "--gpus", 2,
                             "--bandwidth", 1)
    assert "20 images/s on 2 GPUs" in text and "GiB per GPU at micro-batch" in text and "GB a step" in text
    found = load_config(config, [part for part in settings if part != "--set"])
    assert found.train.micro_batch == 2 and found.deepspeed["zero_optimization"]["stage"] == 1


OFFLOADED = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
SECTIONS = {
    "bucket": {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}},
    "offload": {"zero_optimization": {"reduce_bucket_size": 1000, **OFFLOADED}},
    "own sections": {
        "zero_optimization": {"stage": 3, "offload_optimizer": None, "reduce_bucket_size": 1000},
        "generator": {"zero_optimization": {"stage": 0, "offload_optimizer": None}},
        "fake_score": {"zero_optimization": {"stage": 2, **OFFLOADED}}}}


@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS)
def test_the_recommended_settings_need_what_was_said(capsys, write_config, measured_once, section):
    """The plan of the configuration with them says of it, as configured, what it said of the recommended."""
    config = ["--config", write_config(deepspeed=section), "--memory", "0.8G"]
    text, settings = planned(capsys, *config)
    again, _ = planned(capsys, *config, *settings)
    said = re.search(r"^recommended (.*)$", text, re.MULTILINE)[1]
    assert said == re.search(r"^as configured (.*)$", again, re.MULTILINE)[1]


@pytest.mark.parametrize("stage, offload", [(1, False), (2, True)])
@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS)
def test_settings_reach_both_engines(write_config, section, stage, offload):
    """And leave what they do not speak of."""
    words = shlex.split(option(stage, 2, 1, offload=offload).overrides(section))
    found = load_config(write_config(deepspeed=section), [word for word in words if word != "--set"])
    for name in ENGINES:
        engine = engine_section(found, name)
        assert (zero_stage(engine), offloads(engine)) == (stage, offload)
        assert engine["zero_optimization"]["reduce_bucket_size"] == 1000


def test_a_study(capsys, write_config, tmp_path, measured_once):
    """Each of its runs, and all together; runs of one kind are counted once."""
    study = write_study(tmp_path / "study.json", write_config(), {"a": {}, "b": {"optimizer.generator.lr": 1e-5}},
                        seeds=[0, 1], reference="a")
    assert cli.main(["plan", "--config", str(study), "--throughput", "10 images/s"]) == 0
    said = capsys.readouterr()
    assert [line.split(":")[0] for line in said.out.splitlines() if ": 1 GPU, " in line] == [
        "a/seed-0", "b/seed-0", "a/seed-1", "b/seed-1"]
    assert "all 4 runs one after the other: " in said.out and said.err.count("counting the updates, without") == 1
    assert cli.main(["plan", "--config", str(study), "--set", "train.seed=3"]) == 2
    assert "--set" in capsys.readouterr().err


def write_study(path, base, variants, **further):
    path.write_text(json.dumps({"question": "?", "base": base.name, "images": 40, "seeds": [0], "variants": variants,
                                "evaluation": {"images": 100}} | further))
    return path


def test_alike_updates_of_a_study_are_counted_once(capsys, write_config, tmp_path, monkeypatch):
    """And it says of each run what the plan of that run alone says."""
    counted, measure = [], planner.measure_update
    monkeypatch.setattr(planner, "measure_update", lambda name, *args: counted.append(name) or measure(name, *args))
    monkeypatch.setattr(Planner, "_measure", MEASURE)
    monkeypatch.setattr(Planner, "options", lambda self, gpus: [
        self.option(*stage, 2, False, gpus) for stage in planner.STAGES])        # (checkpointing: twice the time)
    monkeypatch.setattr(plan_text, "_memory_table", lambda options: [str(o.bytes) for o in options])
    variants = {"a": {}, "alike": {"guidance.kappa1": 3, "guidance.kappa4": 2, "loss.alpha": 1.2},
                "one pass": {"guidance.kappa1": 1.0}}
    study = write_study(tmp_path / "study.json", write_config(), {k.replace(" ", "-"): v for k, v in variants.items()})
    assert cli.main(["plan", "--config", str(study)]) == 0
    assert sorted(counted) == ["fake_score", "fake_score", "generator"]
    together = capsys.readouterr().out.splitlines()
    for changes in (variants["alike"], variants["one pass"]):
        config = write_config("alone.json", **changes, **{"train.steps": None, "train.images": 40})
        assert cli.main(["plan", "--config", str(config)]) == 0
        for line in capsys.readouterr().out.splitlines()[1:]:
            assert line in together


def test_a_study_that_does_not_divide(capsys, write_config, tmp_path):
    study = write_study(tmp_path / "study.json", write_config(), {"a": {}, "b": {"train.batch_size": 2}})
    assert "b/seed-0: train.batch_size (2) does not divide among 4 GPUs" in fails(
        capsys, cli.main, "plan", "--config", study, "--gpus", 4)


@pytest.mark.slow
def test_no_speed_is_invented(capsys, write_config, measured_once):
    assert cli.main(["plan", "--config", str(write_config())]) == 0
    assert "ASSUMED" in capsys.readouterr().out


def communication_table(P, images_per_s, bandwidths):
    """Markdown for docs/scaling.md: bytes and seconds of a step in bf16, by number of GPUs and ZeRO stage."""
    yield "| GPUs | images a step | ZeRO | sent, GB | computing, s | " + "".join(
        f"at {b} GB/s, s | " for b in bandwidths).rstrip()
    yield "|" + "---|" * (5 + len(bandwidths))
    for gpus, batch, micro_batch in [(8, 512, 8), (64, 512, 8), (512, 512, 1), (64, 4096, 8), (512, 32768, 8)]:
        for stage, title in ((0, "0"), (1, "1, 2"), (3, "3")):                   # (2 sends what 1 does)
            zero = memory.Zero(stage, gpus, 2, False, int(5e8), int(1e9))
            sent = memory.sent_per_step(zero, P, batch // (micro_batch * gpus)) / 1e9
            cells = [gpus, batch, title, f"{sent:.1f}", f"{batch / gpus / images_per_s:.2f}",
                     *(f"{sent / b:.2f}" for b in bandwidths)]
            yield "| " + " | ".join(map(str, cells)) + " |"


def test_the_table_of_the_documentation():
    """docs/scaling.md holds what the code computes, from what was measured."""
    table = "\n".join(communication_table(859_520_964, 24.35, (25, 50, 332.6)))
    assert table in (ROOT / "docs" / "scaling.md").read_text()


def test_throughput():
    for text in ("24G", "24 GiB", "24", "24 GB", "24576M", "24576MiB", " 24576 mb", "0.0234375T", "24.0g"):
        assert parse_memory(text) == 24 * GIB, text
    assert parse_memory("0.08T") == 0.08 * 1024 * GIB
    assert parse_throughput("12 images/s", 1e12)[0] == 12 and parse_throughput("200 TFLOP/s", 1e13)[0] == 20


@pytest.mark.parametrize("args, words", [
    (["--memory", "much"], "--memory much"), (["--memory", ""], "--memory : must be"),
    (["--throughput", ""], "--throughput : must be"), (["--measured", ""], "--measured"),
    (["--architecture", ""], "--architecture : must be one of sd15"), (["--gpus", "3"], "does not divide among 3 GPUs"),
    (["--set", "deepspeed.zero_optimization.stage=7"], "input should be 0, 1, 2 or 3, not 7"),
    (["--memory", "0G"], "--memory"), (["--memory", "24K"], "--memory 24K"), (["--memory", "M"], "--memory M"),
    (["--memory", "\u0662\u0664G"], "--memory"), (["--memory", "24Gb/s"], "--memory"), (["--gpus", "0"], "--gpus 0"),
    (["--bandwidth", "-3"], "--bandwidth -3"), (["--bandwidth", "nan"], "--bandwidth nan"),
    (["--throughput", "fast"], "--throughput fast"), (["--measured", "/nowhere"], "--measured /nowhere"),
    (["--set", "model.teacher=/nowhere/x"], "--architecture"), (["--set", "model.teacher=no/such"], "hub's cache"),
    (["--set", 'deepspeed.zero_optimization={"stage": "x"}'], "must be 0, 1, 2 or 3, not 'x'"),
    (["--set", "train.images=" + "9" * 400], "train.images"),
], ids=lambda v: "" if isinstance(v, str) else " ".join(v))
def test_bad_input(capsys, write_config, monkeypatch, args, words):
    monkeypatch.setattr("sidfast.planning.plan.Planner", lambda *_: pytest.fail("nothing is to be counted"))
    assert words in fails(capsys, cli.main, "plan", "--config", write_config(), *args)


def write_run(folder, config, lines):
    """A run directory, last started on 4 processes."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"config": config.model_dump(), "processes": 4}))
    lines = [json.dumps({"step": k} | line) + "\n" for k, line in enumerate(lines)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def test_measured_run(tmp_path, tiny_teacher, tiny_config):
    """Each line counts for the GPUs that it was written on, as its own numbers tell; those without do not count."""
    config, shapes = build_config(tiny_config, "test"), load_meta_teacher(str(tiny_teacher))
    tflop = Planner(config, shapes).flops / 1e12
    line = lambda rate, processes: {"images_per_s": rate, "tflops_per_gpu": rate * tflop / processes}  # noqa: E731
    run = write_run(tmp_path, config, [{"images_per_s": 90.0}, line(1.0, 2), line(9.0, 2), line(20.0, 4),
                                       {"evaluation/fid": 1.0}])
    rate, text = measured_throughput(run, shapes)
    assert rate == 4.5 and text == f"measured in {run}, median of 3 lines, 2 and 4 processes"
    write_run(tmp_path, config, [{"images_per_s": 8.0}])
    rate, text = measured_throughput(run, shapes)
    assert rate == 2 and text.endswith("1 lines, 4 processes as in its last start, for the lines do not say")


def test_measured_with_another_teacher(capsys, tmp_path, write_config, tiny_teacher):
    """One whose images take other work than by the teacher of the plan, at any number of processes."""
    path = write_config()
    config = load_config(path)
    tflop = 1.37 * Planner(config, load_meta_teacher(str(tiny_teacher))).flops / 1e12
    run = write_run(tmp_path / "run", config, [{"images_per_s": 8.0, "tflops_per_gpu": 8 * tflop}])
    assert "another architecture" in fails(capsys, cli.main, "plan", "--config", path, "--measured", run)
