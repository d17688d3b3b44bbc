"""What a run tells of itself: phases, rates, gradient norms, a trace."""

import copy
import json
import os

import pytest
import torch
from conftest import ROOT, environment
from helpers_engine import optimize
from helpers_input import fails
from sidfast.kernels import backend
from test_full_disk import files_up_to
from test_plan import LATENT, TEXT, device  # noqa: F401 (a fixture)

from sidfast import train
from sidfast.accel import plan as speed
from sidfast.config.schema import build_config, load_config
from sidfast.engines.engine import ENGINES, build_engine, engine_config
from sidfast.monitoring.observe import Monitor, PhaseTimer, Profiler, peak_tflops
from sidfast.runs.directory import RunDirectory
from sidfast.teachers.sd_shapes import build_unet

CPU = torch.device("cpu")


def test_a_phase_inside_another_is_not_counted_twice():
    clock, times = PhaseTimer(CPU), iter((0, 2, 7, 8, 10, 14))
    clock._now = lambda: next(times)
    with clock("outer"), clock("inner"):                 # 0 to 8, 2 to 7
        pass
    with clock("outer"):                                 # 10 to 14
        pass
    assert clock.read() == {"outer": 3 + 4, "inner": 5} and clock.read() == {}


@pytest.mark.parametrize("name, dtype, peak", [
    ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4), ("NVIDIA H100 PCIe", torch.float16, 756.4),
    ("NVIDIA H200", torch.float32, 494.7), ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312.0),
    ("NVIDIA GeForce GTX 970", torch.bfloat16, None), ("", torch.float32, None)], ids=str)
def test_peak(name, dtype, peak):
    assert peak_tflops(name, dtype) == peak


@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("clipping", [0.0, 0.1], ids=["", "clipped"])
def test_gradient_norm(device, stage, bf16, clipping):  # noqa: F811
    """Before clipping, of the mean over the micro-batches, against plain autograd in fp32."""
    if clipping and stage in (1, 2):
        pytest.skip("as without ZeRO, or as stage 3")
    torch.manual_seed(3)
    unet = build_unet(4)
    batches = [(torch.randn(2, *LATENT), torch.randn(2, *TEXT)) for _ in range(2)]

    def loss_of(net, x, text):
        return net(x, torch.tensor([5, 600]), text).sample.float().pow(2).mean()

    plain = copy.deepcopy(unet).train()
    (sum(loss_of(plain, *batch) for batch in batches) / 2).backward()
    want = torch.cat([p.grad.flatten() for p in plain.parameters() if p.grad is not None]).double().norm().item()

    config = build_config({"model": {"teacher": "x"}, "data": {"prompts": "shapes:train"},
                           "train": {"steps": 1, "batch_size": 4, "micro_batch": 2},
                           "deepspeed": {"zero_optimization": {"stage": stage}, "bf16": {"enabled": bf16},
                                         "gradient_clipping": clipping}}, "test")
    engine = build_engine(unet, config.optimizer.generator, engine_config(config, "generator", 1), device)
    dtype = torch.bfloat16 if bf16 else torch.float32
    monitor = Monitor({"generator": engine}, [torch.nn.Identity()], device, dtype, 4, 1)
    optimize(engine, loss_of, [(x.to(dtype), text.to(dtype)) for x, text in batches])
    got = monitor.read(1, 1.0)
    assert got["gradient_norm/generator"] == pytest.approx(want, rel=0.03 if bf16 else 1e-4)
    assert got["seconds/generator_optimizer"] > 0
    engine.destroy()


@pytest.fixture(scope="module")
def profiled(tiny_config, tmp_path_factory):
    """A run of six steps with `--profile 2`."""
    folder = tmp_path_factory.mktemp("profiled")
    config = json.loads(json.dumps(tiny_config))
    config["train"] |= {"steps": 6, "log_every": 2, "save_every": 4, "samples": 1, "sample_every": 3}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (environment(30013) | {"LOCAL_WORLD_SIZE": str(os.cpu_count())}).items():
            patch.setenv(name, value)
        for module in (backend, speed):                  # plain PyTorch, as on any machine without a GPU
            patch.setattr(module, "INTERPRETED", False)
        args = ["--config", str(folder / "config.json"), "--out", str(folder / "run"), "--profile", "2"]
        assert train.main(args) == 0
    return folder / "run"


def test_every_value_is_documented(profiled):
    lines = [json.loads(line) for line in (profiled / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    text = (ROOT / "docs" / "observability.md").read_text()
    for line in lines:
        for key in line:
            section, _, name = key.partition("/")
            documented = f"`{section}/NETWORK`" if name in ENGINES and section != "seconds" else f"`{key}`"
            assert documented in text, key
        assert line["images_per_s"] > 0 and line["tflops_per_gpu"] > 0 and line["share_of_peak"] is None
        for network in ENGINES:
            assert line[f"gradient_norm/{network}"] > 0 and line[f"learning_rate/{network}"] == 1e-3
    phases = {key for line in lines for key in line if key.startswith("seconds/")}
    assert phases >= {"seconds/data", "seconds/text", "seconds/fake_score", "seconds/generator", "seconds/average",
                      "seconds/generator_optimizer", "seconds/fake_score_optimizer", "seconds/sampling",
                      "seconds/checkpoint"}
    for line in lines:                                   # (samples and a checkpoint come between the second and third)
        spent = sum(v for k, v in line.items() if k in phases - {"seconds/sampling", "seconds/checkpoint"})
        assert spent < 4 / line["images_per_s"]
        if line["step"] == 2:                            # (the others have starting and writing the trace in them)
            assert 0.5 * 4 / line["images_per_s"] < spent                        # nearly all of training's time


def test_trace(profiled):
    trace, = (profiled / "profile").iterdir()
    events = json.loads(trace.read_text())["traceEvents"]
    counts = {name: sum(e.get("name") == name and e.get("cat") == "user_annotation" for e in events)
              for name in ("data", "text", "fake_score", "generator", "generator_optimizer", "fake_score_optimizer")}
    assert counts == {"data": 4, "text": 4, "fake_score": 2, "generator": 2, "generator_optimizer": 2,
                      "fake_score_optimizer": 2}


@pytest.mark.parametrize("steps, left", [(3, []), (4, ["trace-1-steps.json"]), (9, ["trace-5-steps.json"])])
def test_trace_is_named_by_its_steps(write_config, tmp_path, steps, left):
    run = RunDirectory(tmp_path / "run", load_config(write_config()), 0)
    trace(run, steps)
    assert [path.name for path in run.out.glob("profile/*")] == left
    run.close()


def test_trace_on_a_full_disk_ends_nothing(capfd, write_config, tmp_path):
    run = RunDirectory(tmp_path / "run", load_config(write_config()), 0)
    with files_up_to(5000):
        trace(run, 9)
    assert run.lost == ["the trace"] and not list((run.out / "profile").iterdir())
    assert "sidfast: the trace could not be written: PyTorch's profiler found no room, or" in capfd.readouterr().err
    run.close()


def trace(run, steps):
    profiler = Profiler(5, run.out / "profile", CPU, run)
    for _ in range(steps):
        torch.ones(2).sum()
        profiler.step()
    profiler.close()


def test_profile_wants_a_number_of_steps(capsys, write_config, tmp_path):
    line = fails(capsys, train.main, "--config", write_config(), "--out", tmp_path / "run", "--profile", "-1")
    assert "--profile -1" in line
