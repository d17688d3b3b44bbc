"""Training does not depend on ZeRO's stage, on the number of processes, or on how the batch is split."""

import copy
import json

import pytest
import torch
from conftest import free_port, losses, run_jobs, start_launcher, wait_for_all
from helpers_method import assert_close, in_float64, naive_fake_score_update, naive_generator_update, objective_of
from tiny import NO_MIDDLE, write_tiny_teacher

from sidfast.checkpoints.store import read_tensors
from sidfast.config.schema import build_config
from sidfast.data.prompts import open_prompts
from sidfast.teachers.fit import noise_levels
from sidfast.teachers.load import load_teacher
from sidfast.training.batches import Batches, TextEncoder

STAGES = (0, 1, 2, 3)


def changed(config, **changes):
    config = copy.deepcopy(config)
    for key, value in changes.items():
        section, name = key.split("__")
        config.setdefault(section, {})[name] = value
    return config


def stages(config, folder, processes, stages=STAGES):
    """A run in each, of one pass a step."""
    micro_batch = config["train"]["batch_size"] // processes
    return [{"config": changed(config, deepspeed__zero_optimization={"stage": stage}, train__micro_batch=micro_batch),
             "out": str(folder / f"stage-{stage}-of-{processes}")} for stage in stages]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """With fewer layers than that of other tests: in stage 3 each costs DeepSpeed a millisecond or two, every pass."""
    return write_tiny_teacher(tmp_path_factory.mktemp("zero-teacher"), unet_blocks=NO_MIDDLE)


@pytest.fixture(scope="module")
def tiny_config(tiny_config, teacher):
    return changed(tiny_config, model__teacher=str(teacher))


@pytest.fixture(scope="module")
def runs(tiny_config, tmp_path_factory):
    """The folder of the runs on one process."""
    folder = tmp_path_factory.mktemp("zero")
    bf16 = [{"config": changed(tiny_config, train__steps=3, deepspeed__zero_optimization={"stage": stage},
                               deepspeed__bf16={"enabled": True}), "out": str(folder / f"bf16-{stage}")}
            for stage in STAGES]
    others = [{"config": changed(tiny_config, train__steps=8), "out": str(folder / "two-passes")},
              {"config": changed(tiny_config, train__fake_score_factor=2, train__steps=8),
               "out": str(folder / "wide-0")}]
    sharded = {"config": changed(tiny_config, train__fake_score_factor=2, train__steps=4,
                                 deepspeed__zero_optimization={"stage": 3}), "out": str(folder / "wide-3")}
    one_step = [{"config": changed(tiny_config, train__steps=1, deepspeed__zero_optimization={"stage": stage}),
                 "out": str(folder / f"one-step-{stage}")} for stage in STAGES]
    run_jobs([*stages(tiny_config, folder, 1, (0, 1, 2)), *bf16, *others, *one_step, sharded], folder, 1, 29711)
    return folder


@pytest.fixture(scope="module")
def pairs(tiny_config, runs):
    """The same folder, with the runs on two processes, and that of stage 3 on one."""
    run_jobs(stages(tiny_config, runs, 1, (3,)), runs, 1, 29715)
    run_jobs(stages(tiny_config, runs, 2), runs, 2, 29712)
    return runs


def assert_same_curve(got, want, bound):
    assert len(got) == len(want)
    for (step, *a), (_, *b) in zip(got, want, strict=True):
        for name, x, y in zip(("fake_score_loss", "generator_loss"), a, b, strict=True):
            assert x == pytest.approx(y, rel=bound), f"step {step}: {name} {x} is not {y}"


@pytest.mark.parametrize("stage", [0, 1, 2], ids="stage={}".format)
def test_same_curve_in_every_stage(runs, stage):
    want = losses(runs / "stage-0-of-1")
    assert len(want) == 20 and want[0][1:] != want[-1][1:]
    assert_same_curve(losses(runs / f"stage-{stage}-of-1"), want, 1e-4)


@pytest.mark.slow
def test_same_curve_in_stage_3(pairs):
    """Of which test_accumulation_equals_one_pass has the first steps."""
    assert_same_curve(losses(pairs / "stage-3-of-1"), losses(pairs / "stage-0-of-1"), 1e-4)


@pytest.fixture(scope="module")
def first_weights(teacher):
    """Of both networks: the teacher's."""
    return load_teacher(teacher).network.state_dict()


@pytest.fixture(scope="module")
def first_gradients(tiny_config, runs):
    """{network: {name: gradient}} of the first step, in float64 and sample by sample."""
    config = build_config(tiny_config, "test")
    teacher = load_teacher(config.model.teacher)
    encoder = TextEncoder(teacher, torch.float32)
    whole = config.train.model_copy(update={"micro_batch": config.train.batch_size})
    batches = Batches(open_prompts(config.data.prompts, config.train.seed), encoder,
                      noise_levels(teacher.schedule, config.noise), (4, 8, 8), whole, config.guidance.prompt_dropout,
                      config.synthetic, 0, torch.device("cpu"))
    objective, unet = objective_of(1.5, 1.5, 1.5, 1.5), teacher.network.double().requires_grad_(True)
    generator, trained = copy.deepcopy(unet), copy.deepcopy(unet)            # the generator's turn is the second
    checkpoint = runs / "one-step-0" / "checkpoints" / "step-00000001"
    trained.load_state_dict(read_tensors(checkpoint, "fake_score", "weights"))
    [first], [second] = (batches(0, update) for update in ("fake_score", "generator"))
    return {"fake_score": naive_fake_score_update((unet, unet, unet), in_float64(first), objective)[1],
            "generator": naive_generator_update((generator, trained, unet), in_float64(second), objective)[1]}


@pytest.mark.parametrize("stage", STAGES, ids="stage={}".format)
@pytest.mark.parametrize("network", ("fake_score", "generator"))
def test_adam_sees_the_gradient_itself(runs, first_weights, first_gradients, network, stage):
    """Neither clipped nor scaled: after one step the second moment is (1 - beta2) g^2, and weights went against g."""
    checkpoint = runs / f"one-step-{stage}" / "checkpoints" / "step-00000001"
    second, after = (read_tensors(checkpoint, network, kind) for kind in ("exp_avg_sq", "weights"))
    got = {name: (v / (1 - 0.999)).sqrt() * (first_weights[name] - after[name]).sign() for name, v in second.items()}
    want = first_gradients[network]
    assert got.keys() == want.keys()
    assert_close(network, *(torch.cat([v[name].flatten() for name in want]) for v in (got, want)), bound=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES, ids="stage={}".format)
def test_same_curve_on_two_processes(pairs, stage):
    assert_same_curve(losses(pairs / f"stage-{stage}-of-2"), losses(pairs / "stage-0-of-1"), 1e-4)


@pytest.mark.parametrize("name", ["two-passes", "wide-0", "wide-3"])
def test_accumulation_equals_one_pass(runs, name):
    """Of both updates, or of the fake score's alone."""
    steps = 4 if name == "wide-3" else 8
    assert_same_curve(losses(runs / name), losses(runs / "stage-0-of-1")[:steps], 1e-4)


@pytest.mark.slow
def test_resume_with_other_stage_and_process_count(tiny_config, runs, tmp_path):
    run_jobs([{"config": changed(tiny_config, train__steps=10), "out": str(tmp_path / "short")}], tmp_path, 1, 29713)
    run_jobs([{"config": changed(tiny_config, deepspeed__zero_optimization={"stage": 3}),
               "out": str(tmp_path / "resumed"),
               "resume": str(tmp_path / "short" / "checkpoints" / "step-00000010")}], tmp_path, 2, 29714)
    assert_same_curve(losses(tmp_path / "resumed"), losses(runs / "stage-0-of-1")[10:], 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_fused_in_stage_3(tiny_teacher, tiny_config, tmp_path, checkpointing):
    """Blocks of one parameter each, on two processes, in Triton's interpreter: the curve and the checkpoint of a plain
    run; another stage goes on from it."""
    config = changed(tiny_config, model__teacher=str(tiny_teacher), train__steps=2, train__save_every=1,
                     train__batch_size=2, train__micro_batch=1)
    fused = changed(config, deepspeed__zero_optimization={"stage": 3}, speed__fused=True,
                    speed__gradient_checkpointing=checkpointing)
    run_jobs([{"config": config, "out": str(tmp_path / "plain")}], tmp_path, 1, free_port())
    (tmp_path / "fused.json").write_text(json.dumps([{"config": fused, "out": str(tmp_path / "fused")}]))
    wait_for_all([start_launcher("tests/jobs.py", tmp_path / "fused.json", processes=2, port=free_port(),
                                 TRITON_INTERPRET="1")])
    assert_same_curve(losses(tmp_path / "fused"), losses(tmp_path / "plain"), 1e-4)
    first, second = (tmp_path / "fused" / "checkpoints" / f"step-0000000{k}" for k in (1, 2))
    for kind in ("weights", "exp_avg_sq", "ema"):
        got = read_tensors(second, "generator", kind)
        want = read_tensors(tmp_path / "plain" / "checkpoints" / "step-00000002", "generator", kind)
        assert got.keys() == want.keys()
        assert_close(kind, *(torch.cat([v[name].flatten() for name in want]) for v in (got, want)), bound=1e-3)
    run_jobs([{"config": config, "out": str(tmp_path / "on"), "resume": str(first)}], tmp_path, 1, free_port())
    assert_same_curve(losses(tmp_path / "on"), losses(tmp_path / "plain")[1:], 1e-4)


@pytest.mark.parametrize("stage", STAGES, ids="stage={}".format)
def test_bf16_stays_near_fp32(runs, stage):
    """Networks in bf16: the first steps agree to bf16's accuracy, and masters and average are kept in fp32."""
    for (_, *a), (_, *b) in zip(losses(runs / f"bf16-{stage}"), losses(runs / "stage-0-of-1")[:3], strict=True):
        assert a[0] == pytest.approx(b[0], rel=0.02)
    average = read_tensors(runs / f"bf16-{stage}" / "checkpoints" / "step-00000003", "generator", "ema")
    rounded = [v for v in average.values() if not torch.equal(v, v.bfloat16().float())]
    assert len(rounded) > len(average) / 2


@pytest.mark.slow
def test_checkpoints_do_not_depend_on_the_stage(pairs):
    for kind in ("weights", "exp_avg_sq", "ema"):
        want = read_tensors(pairs / "stage-0-of-1" / "checkpoints" / "step-00000020", "generator", kind)
        for stage, processes in ((1, 1), (2, 2), (3, 2)):
            run = pairs / f"stage-{stage}-of-{processes}"
            got = read_tensors(run / "checkpoints" / "step-00000020", "generator", kind)
            assert got.keys() == want.keys()
            for name in want:
                error = (got[name] - want[name]).norm() / want[name].norm().clamp_min(1e-12)
                assert error < 1e-3, f"stage {stage}, {processes} processes, {kind}, {name}: {error:.1e}"
