"""Two processes over gloo: they equal one, and a signal to either of them is a signal to both."""

import json
import signal
import time

import pytest
import torch
from conftest import Forked, free_port, losses, run_jobs
from helpers_method import assert_close
from tiny import NO_MIDDLE, write_tiny_teacher

from sidfast.checkpoints.store import by_age, read_tensors

STAGES = (0, 2)


@pytest.fixture(scope="module")
def config(tiny_config, tmp_path_factory):
    teacher = write_tiny_teacher(tmp_path_factory.mktemp("pairs") / "teacher", unet_blocks=NO_MIDDLE)
    return tiny_config | {"model": {"teacher": str(teacher)}}


@pytest.fixture(scope="module")
def runs(config, tmp_path_factory):
    """The folder of runs of three steps: on one process, and on two at each of the stages."""
    folder = tmp_path_factory.mktemp("runs")

    def job(stage, name):
        return {"config": config | {"deepspeed": {"zero_optimization": {"stage": stage}},
                                    "train": config["train"] | {"steps": 3}}, "out": str(folder / name)}

    run_jobs([job(0, "one")], folder, 1, free_port())
    run_jobs([job(stage, f"two-{stage}") for stage in STAGES], folder, 2, free_port())
    return folder


@pytest.mark.parametrize("stage", STAGES, ids="stage={}".format)
def test_two_processes_equal_one(runs, stage):
    want, got = losses(runs / "one"), losses(runs / f"two-{stage}")
    assert len(want) == 3 and want[0] != want[2]
    for (_, *a), (_, *b) in zip(got, want, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    for network, kind in (("generator", "weights"), ("fake_score", "exp_avg_sq"), ("generator", "ema")):
        a, b = (read_tensors(runs / name / "checkpoints" / "step-00000003", network, kind)
                for name in (f"two-{stage}", "one"))
        assert a.keys() == b.keys()
        assert_close(kind, *(torch.cat([v[name].flatten() for name in b]) for v in (a, b)), bound=1e-3)


def test_rate_of_one_process(runs):
    """TFLOP/s are those of a process: of two, half of what their images take."""
    per_image = []
    for name in ("one", "two-0"):
        line = json.loads((runs / name / "metrics.jsonl").read_text().splitlines()[-1])
        per_image.append(line["tflops_per_gpu"] / line["images_per_s"])
    assert per_image[1] == pytest.approx(per_image[0] / 2)


def test_signal_to_one_of_two(config, tmp_path):
    """Both end after the same step, which is saved."""
    out, path = tmp_path / "run", tmp_path / "config.json"
    path.write_text(json.dumps(config | {"train": config["train"] | {"steps": 10**6, "save_every": 10**6}}))
    port = free_port()
    pair = [Forked("train", ["--config", path, "--out", out], port, RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE="2",
                   LOCAL_SIZE="2", MASTER_ADDR="127.0.0.1") for r in (0, 1)]
    try:
        deadline = time.monotonic() + 120
        while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_text().splitlines()) < 2:
            assert time.monotonic() < deadline and pair[0].poll() is pair[1].poll() is None, pair[0].stderr.read()
            time.sleep(0.01)
        pair[1].send_signal(signal.SIGTERM)
        assert [process.wait(60) for process in pair] == [0, 0], pair[0].stderr.read()[-2000:]
    finally:
        for process in pair:
            process.kill()
    last = losses(out)[-1][0]
    assert [folder.name for folder in by_age(out / "checkpoints")] == [f"step-{last:08d}"]
    assert f"stopped by SIGTERM after step {last}; the last checkpoint is {out}" in pair[0].stderr.read()
