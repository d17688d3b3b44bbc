"""What the speed section decides: asked for and impossible is an error, left to itself it falls back and says why."""

import copy
import functools

import pytest
import torch
from diffusers import UNet2DConditionModel
from harness import compiled_blocks

from sidfast.accel import plan as speed
from sidfast.accel.unet import FusedUNet, fuse
from sidfast.common.errors import UserError
from sidfast.config.schema import Config, Speed
from sidfast.teachers.load import load_teacher

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher(tiny_teacher):
    return load_teacher(str(tiny_teacher))


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    monkeypatch.setattr(speed, "INTERPRETED", False)


def decide(teacher, stages=(0, 0), device=CPU, **section):
    return speed.resolve_acceleration(Speed(**section), teacher, (4, 8, 8), 2, stages, torch.float32, device)


@pytest.mark.parametrize("section, message", [
    ({"fused": True}, "speed.fused: impossible, there is no GPU here"),
    ({"cuda_graphs": True}, "speed.cuda_graphs: impossible, there is no GPU here"),
    ({"overlap": True}, "speed.overlap: impossible without CUDA graphs"),
    ({"compile": True, "fused": True}, "speed.compile is for networks without the fused kernels"),
    ({"attention": "flash", "fused": "auto"}, "speed.attention .flash. chooses for the fused kernels.*no GPU here"),
], ids=str)
def test_asked_for_and_impossible(teacher, section, message):
    with pytest.raises(UserError, match=message):
        decide(teacher, **section)


def test_graphs_and_zero_3_exclude_each_other(teacher):
    gpu = torch.device("cuda")
    with pytest.raises(UserError, match="cuda_graphs: impossible, ZeRO stage 3 moves parameters"):
        decide(teacher, (0, 3), gpu, fused=False, cuda_graphs=True)
    assert decide(teacher, (2, 2), gpu, fused=False).cuda_graphs
    assert decide(teacher, (2, 2), gpu, fused=False).overlap
    assert not decide(teacher, (2, 2), gpu, fused=False, overlap=False).overlap
    decided = decide(teacher, (0, 3), gpu, fused=False)
    assert not decided.cuda_graphs and not decided.overlap and "ZeRO stage 3" in decided.notes[0]


def test_auto_falls_back_and_says_why(teacher):
    decided = decide(teacher, fused="auto", cuda_graphs="auto")
    assert not decided.fused and not decided.cuda_graphs and not decided.overlap
    assert decided.notes == ("no fused kernels: there is no GPU here", "no CUDA graphs: there is no GPU here")
    assert decide(teacher) == decided
    assert not decide(teacher, fused=False, cuda_graphs=False).notes


def test_attention_is_timed_on_the_shapes_of_the_run(teacher, monkeypatch):
    """Self and cross attention of every layer of the tiny UNet."""
    monkeypatch.setattr(speed, "INTERPRETED", True)
    decided = decide(teacher, fused=True)
    assert decided.fused and not isinstance(decided.attention_ms[decided.attention], str)
    shapes = speed.attention_shapes(teacher.network, 2, lambda unet: unet(
        torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, 32, 16)))
    layers = sum(type(m).__name__ == "BasicTransformerBlock" for m in teacher.network.modules())
    assert {shape[:5] for shape in shapes} == {(2, 64, 64, 4, 4), (2, 64, 32, 4, 4)}
    assert sum(count for *_, count in shapes) == 2 * layers


def test_attention_that_does_not_work_here(teacher, monkeypatch):
    """Asked for by name, it is tried before the first pass."""
    monkeypatch.setattr(speed, "INTERPRETED", True)
    decided = decide(teacher, fused=True, attention="math")
    assert decided.attention == "math" and list(decided.attention_ms) == ["math"]
    with pytest.raises(UserError, match=r"speed.attention: cudnn does not work here .*; leave it at auto"):
        decide(teacher, fused=True, attention="cudnn")


@pytest.mark.parametrize("kappas, factor, rows", [
    ((1, 1, 1, 1), 1, 4), ((1.5, 1, 1, 1), 1, 8), ((1, 1, 1, 1.5), 1, 8), ((1, 1, 1, 1), 2, 8),
    ((1.5, 1.5, 1.5, 1.5), 2, 16), ((1, 1.5, 1.5, 1.5), 2, 8)])
def test_largest_pass(tiny_config, kappas, factor, rows):
    guidance = dict(zip(("kappa1", "kappa2", "kappa3", "kappa4"), kappas, strict=True))
    train = tiny_config["train"] | {"batch_size": 16, "fake_score_factor": factor}
    assert speed.largest_pass(Config.model_validate(tiny_config | {"guidance": guidance, "train": train}), 4) == rows


def test_prepare(teacher):
    unet = copy.deepcopy(teacher.network)
    assert type(decide(teacher).prepare(unet)) is type(teacher.network) and not unet.is_gradient_checkpointing
    assert decide(teacher, gradient_checkpointing=True).prepare(unet).is_gradient_checkpointing
    assert isinstance(fuse(copy.deepcopy(teacher.network)), FusedUNet)


@pytest.fixture
def usual_limits():
    """Of recompilations, afterwards too. (monkeypatch would take these attributes away.)"""
    limits = {"recompile_limit": 8, "accumulated_recompile_limit": 9, "fail_on_recompile_limit_hit": False}
    with torch.compiler.config.patch(limits):
        yield torch.compiler.config


def test_every_block_runs_compiled(teacher, monkeypatch, usual_limits):
    """More sizes than torch.compile takes unasked, in each role of training, all networks in one process."""
    monkeypatch.setattr(torch.nn.Module, "compile",
                        functools.partialmethod(torch.nn.Module.compile, backend="eager"))
    config = {"sample_size": 8, "cross_attention_dim": 8, "attention_head_dim": 4, "norm_num_groups": 4,
              "block_out_channels": (8, 12), "layers_per_block": 1,
              "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
              "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    x, inputs = torch.randn(2, 4, 8, 8), (torch.ones(2), torch.randn(2, 3, 8))
    for _ in range(2):
        unet = UNet2DConditionModel(**config)
        blocks = sum(type(m).__name__ in ("ResnetBlock2D", "BasicTransformerBlock") for m in unet.modules())
        assert blocks > 9
        decide(teacher, compile=True).prepare(unet)
        for trained, frozen in ((False, False), (True, False), (False, True)):
            unet.requires_grad_(trained)
            step = functools.partial(unet, x.clone().requires_grad_(frozen), *inputs)
            with torch.set_grad_enabled(trained or frozen):
                assert compiled_blocks(step) == blocks
    assert usual_limits.fail_on_recompile_limit_hit and usual_limits.recompile_limit == 8 * blocks
