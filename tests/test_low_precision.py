"""Training in fp16 and bf16: the loss scale, and what a run that goes on takes over."""

import json

import pytest
import torch
from conftest import losses
from helpers_method import assert_close
from helpers_training import train_here
from tiny import NO_MIDDLE, write_tiny_teacher

from sidfast.checkpoints.store import read_tensors

FP16 = {"fp16": {"enabled": True, "initial_scale_power": 10, "loss_scale_window": 1, "hysteresis": 1}}
BF16 = {"bf16": {"enabled": True}}
NETWORKS = ("generator", "fake_score")


@pytest.fixture(scope="module")
def config(tiny_config, tmp_path_factory):
    """config(folder, deepspeed, **train) -> the path of a configuration."""
    teacher = write_tiny_teacher(tmp_path_factory.mktemp("low") / "teacher", unet_blocks=NO_MIDDLE)

    def write(folder, deepspeed, **train):
        values = tiny_config | {"model": {"teacher": str(teacher)}, "deepspeed": deepspeed,
                                "train": tiny_config["train"] | train}
        path = folder / "config.json"
        path.write_text(json.dumps(values))
        return path

    return write


def whole(out, step, network, kind):
    tensors = read_tensors(out / "checkpoints" / f"step-{step:08d}", network, kind)
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def moments(config, folder, section):
    """{network: Adam's second moment after one step}. The fake score stays as it is: the generator's update, which
    comes second, has the same networks in every type."""
    folder.mkdir()
    train_here(config(folder, section, steps=1), folder / "run", "--set", "optimizer.fake_score.lr=1e-12", "--set",
               "guidance.kappa4=3")
    return {network: whole(folder / "run", 1, network, "exp_avg_sq") for network in NETWORKS}


def test_gradients_in_fp16_are_those_of_fp32(config, tmp_path):
    """Of two micro-batches: neither the loss scale nor the sum over them is left in Adam's second moment."""
    want = moments(config, tmp_path / "fp32", {})
    for stage in (0, 2):
        got = moments(config, tmp_path / f"fp16-{stage}", FP16 | {"zero_optimization": {"stage": stage}})
        for network in NETWORKS:
            assert_close(f"stage {stage}, {network}", got[network].sqrt(), want[network].sqrt(), bound=0.05)


@pytest.mark.parametrize("section", [FP16, BF16], ids=["fp16", "bf16"])
def test_a_run_goes_on_exactly(config, tmp_path, section):
    """Both networks from their own weights, and with the loss scale that was reached, which doubles at every step."""
    path, uncut, cut = config(tmp_path, section, steps=2, save_every=1), tmp_path / "whole", tmp_path / "cut"
    train_here(path, uncut)
    for steps in (1, 2):
        train_here(path, cut, "--set", f"train.steps={steps}")
    assert losses(cut) == losses(uncut)                  # exact: same bits
    for network in NETWORKS:
        assert torch.equal(whole(cut, 2, network, "weights"), whole(uncut, 2, network, "weights"))
    for out in (uncut, cut) if section is FP16 else ():
        lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        assert [line["loss_scale/generator"] for line in lines] == [2.0**10, 2.0**11]
