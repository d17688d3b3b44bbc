"""What `sidfast plan` counts, against live engines, measured memory, and PyTorch's own counters."""

import copy
import gc
import json
import re
import shlex

import pytest
import torch
from conftest import ROOT, environment, free_port
from deepspeed import comm
from diffusers import UNet2DConditionModel
from helpers_engine import optimize
from test_bad_input import fails
from torch.utils.flop_counter import FlopCounterMode

from sidfast import cli, train
from sidfast.config import Adam, build_config, load_config
from sidfast.method.distill import Objective
from sidfast.method.noise import NoiseSchedule
from sidfast.networks.loading import load_teacher
from sidfast.training import footprint, memory, plan_text, planner
from sidfast.training.engines import ENGINES, build_engine, engine_config, engine_section, offloads, zero_stage
from sidfast.training.plan import measured_throughput, parse_memory, parse_throughput
from sidfast.training.planner import GIB, Option, Planner, load_shapes, recommend

SCHEDULE = NoiseSchedule(torch.linspace(0.999, 0.005, 1000))
MEASURE = Planner._measure
LATENT, TEXT = (4, 8, 8), (32, 128)
LARGE = (4, 16, 16)


def unets(device, dtype=torch.float32, checkpointing=False):
    """A UNet of one level, three times."""
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(
            sample_size=16, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("UpBlock2D",),
            block_out_channels=(32,), layers_per_block=1, cross_attention_dim=128, attention_head_dim=4,
            norm_num_groups=8).to(dtype)
    if checkpointing:
        unet.train().enable_gradient_checkpointing()
    return {name: copy.deepcopy(unet) for name in ("generator", "fake_score", "teacher")}


def objective(device, *kappas):
    return Objective(SCHEDULE.to(device), "epsilon", *(kappas or (1.5,) * 4))


@pytest.mark.parametrize("kappas", [pytest.param((1.5,) * 4, marks=pytest.mark.slow), (1.5, 1, 1, 3.0)], ids=str)
def test_flops(kappas):
    """Of the whole updates, of PyTorch's counter, and of the short way, all the same."""
    nets = unets("meta")
    total = 0
    for name in footprint.UPDATES:
        found = footprint.measure_update(name, nets, objective("meta", *kappas), LARGE, TEXT, torch.float32)
        total += found.flops
    assert total == pytest.approx(footprint.image_flops(nets["teacher"], LARGE, TEXT, kappas), rel=1e-9)
    x, t, text = (torch.zeros(1, *shape, device="meta") for shape in (LARGE, (), TEXT))
    with FlopCounterMode(display=False) as counter:
        nets["teacher"](x, t, text)
    ledger = footprint.Ledger()
    with ledger:
        nets["teacher"](x, t, text)
    assert ledger.flops == counter.get_total_flops() > 0


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["fake_score", pytest.param("generator", marks=pytest.mark.slow)])
def test_memory_of_an_update(name, checkpointing):
    """The meta device's count against what PyTorch's CPU allocator gave out in the same update at micro-batch 4."""
    counted = footprint.measure_update(name, unets("meta", checkpointing=checkpointing), objective("meta"), LARGE, TEXT,
                                       torch.float32)
    nets = unets("cpu", checkpointing=checkpointing)
    footprint._run(name, nets, objective("cpu"), LARGE, TEXT, torch.float32, 2)                     # warm up
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        footprint._run(name, nets, objective("cpu"), LARGE, TEXT, torch.float32, 4)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    assert counted.peak(4) == pytest.approx(peak, rel=0.1)
    without = footprint.measure_update(name, unets("meta"), objective("meta"), LARGE, TEXT, torch.float32)
    assert not checkpointing or counted.peak(64) < 0.6 * without.peak(64)


def test_the_peak_is_known_for_every_micro_batch():
    """From two of them: the same as measured at a third."""
    at_two = footprint.measure_update("generator", unets("meta"), objective("meta"), LARGE, TEXT, torch.float32)
    timeline, _ = footprint._run("generator", unets("meta"), objective("meta"), LARGE, TEXT, torch.float32, 7)
    assert at_two.peak(7) == max(map(sum, timeline))
    assert at_two.peak(7, gradients=False) == max(beside + rest for _, beside, rest in timeline)
    assert at_two.peak(7, gradients=False, beside=False) == max(rest for _, _, rest in timeline)
    assert at_two.beside(7) == max(beside for _, beside, _ in timeline) > 0.2 * at_two.peak(7)
    assert max(own for own, _, _ in timeline) == 4 * at_two.parameters


@pytest.fixture(scope="module")
def device():
    """This process as a group of one."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(free_port()).items():
            patch.setenv(name, value)
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setenv("LOCAL_WORLD_SIZE", "2")
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"):
            patch.delenv(name, raising=False)
        gc.freeze()                                      # (`storages` looks through what comes from now on)
        yield train.join()
        gc.unfreeze()
        if torch.distributed.is_initialized():           # (a whole run in between ends it)
            comm.destroy_process_group()


def storages():
    """{address: bytes} of every tensor that Python knows."""
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):                # (other tests leave fake ones)
            for t in (thing, thing.grad if thing.is_leaf else None):
                if t is not None and t.device.type == "cpu":
                    found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return found


def one_level():
    """As large as the shapes world's in bytes, more or less, with half the layers."""
    return UNet2DConditionModel(
        sample_size=8, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=32,
        block_out_channels=(160,), layers_per_block=1, cross_attention_dim=128, attention_head_dim=4)


@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("beta1", [0.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_memory_of_an_engine(device, stage, bf16, beta1):
    """All tensors that a DeepSpeed engine leaves in memory after a step, and with a step's gradients."""
    config = build_config({"model": {"teacher": "x"}, "data": {"prompts": "shapes:train"},
                           "train": {"steps": 1, "batch_size": 4, "micro_batch": 2},
                           "optimizer": {"generator": {"beta1": beta1}},
                           "deepspeed": {"zero_optimization": {"stage": stage, "reduce_bucket_size": 100_000},
                                         "bf16": {"enabled": bf16}}}, "test")
    section = engine_config(config, "generator", 1)
    gc.collect()
    before = storages()
    engine = build_engine(one_level(), config.optimizer.generator, section, device)
    dtype = torch.bfloat16 if bf16 else torch.float32
    x, text = torch.ones(2, *LATENT, dtype=dtype), torch.ones(2, *TEXT, dtype=dtype)
    P = sum(p.numel() for p in one_level().parameters())

    loss_of = lambda unet: unet(x, torch.tensor([5, 6]), text).sample.float().pow(2).mean()  # noqa: E731

    def kept():
        gc.collect()
        return sum(size for address, size in storages().items() if address not in before)

    for _ in range(2):
        optimize(engine, loss_of, [(), ()])
    zero = memory.Zero.of(section, 1, config.optimizer.generator)
    resident = sum(memory.resident(zero, P).values()) + memory.sums(zero, P)
    assert memory.resident(zero, P)["moments"] == (8 if beta1 else 4) * P
    assert kept() == pytest.approx(resident, rel=0.02)
    if stage < 3:
        engine.backward(engine(engine.summed.hand_over))
        gone = zero.width * P * (stage == 2 and bf16)    # stage 2 gives whole gradients back as it goes
        assert kept() == pytest.approx(resident + memory.during_hand_over(zero, P) - gone, rel=0.03)
    else:
        engine.backward(engine(loss_of))                 # (not at the accumulation boundary: nothing is stepped)
        assert kept() == pytest.approx(resident, rel=0.03)
    engine.destroy()


def test_sharding():
    """On many GPUs only what ZeRO shards shrinks."""
    one, many = (memory.resident(memory.Zero(2, n, 2, False, 10, 10), 1000) for n in (1, 100))
    assert many["weights"] == one["weights"] == 2000 and many["moments"] == one["moments"] / 100 == 80
    offloaded = memory.Zero(2, 2, 2, True, 10, 10)
    assert memory.resident(offloaded, 1000)["moments"] == 0 and memory.on_host(offloaded, 1000) == 8000


@pytest.mark.parametrize("beta1, stage, offload, on_gpu, on_host", [
    (0, 1, "none", 4, 0), (0.5, 1, "none", 8, 0), (0, 0, "none", 4, 0), (0, 2, "cpu", 0, 16), (0.5, 3, "nvme", 0, 16)])
def test_moments(beta1, stage, offload, on_gpu, on_host):
    """One without momentum; both where DeepSpeed's Adam for the CPU keeps them. Bytes a parameter."""
    section = {"zero_optimization": {"stage": stage, "offload_optimizer": {"device": offload}}}
    zero = memory.Zero.of(section, 1, Adam(beta1=beta1))
    assert memory.resident(zero, 1000)["moments"] == 1000 * on_gpu and memory.on_host(zero, 1000) == 1000 * on_host


@pytest.mark.parametrize("stage, sent", [(0, 4), (1, 6), (2, 6), (3, 4 * 11)])
def test_communication(stage, sent):
    """In units of a network's bytes, at half of them per ring of two: 4 micro-batches."""
    zero = memory.Zero(stage, 2, 2, False, 10, 10)
    assert memory.sent_per_step(zero, 1000, 4) == sent * 2000 / 2
    assert memory.sent_per_step(memory.Zero(stage, 1, 2, False, 10, 10), 1000, 4) == 0
    fewer = 2 * 4 * 1000 if stage == 3 else 0            # half as often: two of its own passes, the generator's, a sum
    assert memory.sent_per_step(zero, 1000, 4, factor=2) == (sent * 2000 - 2 * fewer) / 2


def test_shapes_of_a_folder_are_those_of_its_weights(tiny_teacher):
    shapes, teacher = load_shapes(str(tiny_teacher)), load_teacher(str(tiny_teacher))
    for name in ("unet", "vae", "text_encoder"):
        got, want = getattr(shapes, name), getattr(teacher, name)
        assert {k: v.shape for k, v in got.named_parameters()} == {k: v.shape for k, v in want.named_parameters()}
        assert all(p.is_meta for p in got.parameters())
    assert shapes.text_length == teacher.tokenizer.model_max_length


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
        key = (checkpointing, *names, self.dtype, self.latent_shape, self.shapes.text_length, self.fused,
               self.shapes.prediction_type, self.shapes.unet.to_json_string(), self.config.guidance.model_dump_json(),
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
    words = shlex.split(option(stage, 2, 1, offload=offload).settings(section))
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
    assert parse_memory("24G") == parse_memory("24 GiB") == parse_memory("24") == 24 * GIB
    assert parse_throughput("12 images/s", 1e12)[0] == 12 and parse_throughput("200 TFLOP/s", 1e13)[0] == 20


@pytest.mark.parametrize("args, words", [
    (["--memory", "much"], "--memory much"), (["--memory", ""], "--memory : must be"),
    (["--throughput", ""], "--throughput : must be"), (["--measured", ""], "--measured"),
    (["--architecture", ""], "--architecture : must be one of sd15"), (["--gpus", "3"], "does not divide among 3 GPUs"),
    (["--set", "deepspeed.zero_optimization.stage=7"], "input should be 0, 1, 2 or 3, not 7"),
    (["--memory", "0G"], "--memory"), (["--gpus", "0"], "--gpus 0"),
    (["--bandwidth", "-3"], "--bandwidth -3"), (["--bandwidth", "nan"], "--bandwidth nan"),
    (["--throughput", "fast"], "--throughput fast"), (["--measured", "/nowhere"], "--measured /nowhere"),
    (["--set", "model.teacher=/nowhere/x"], "--architecture"), (["--set", "model.teacher=no/such"], "hub's cache"),
    (["--set", 'deepspeed.zero_optimization={"stage": "x"}'], "must be 0, 1, 2 or 3, not 'x'"),
    (["--set", "train.images=" + "9" * 400], "train.images"),
], ids=lambda v: "" if isinstance(v, str) else " ".join(v))
def test_bad_input(capsys, write_config, monkeypatch, args, words):
    monkeypatch.setattr("sidfast.training.plan.Planner", lambda *_: pytest.fail("nothing is to be counted"))
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
    config, shapes = build_config(tiny_config, "test"), load_shapes(str(tiny_teacher))
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
    tflop = 1.37 * Planner(config, load_shapes(str(tiny_teacher))).flops / 1e12
    run = write_run(tmp_path / "run", config, [{"images_per_s": 8.0, "tflops_per_gpu": 8 * tflop}])
    assert "another architecture" in fails(capsys, cli.main, "plan", "--config", path, "--measured", run)
