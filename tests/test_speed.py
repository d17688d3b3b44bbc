"""What the speed section decides: asked for and impossible is an error, left to itself it falls back and says why."""

import copy

import pytest
import torch

from sidfast.config import Speed
from sidfast.errors import UserError
from sidfast.networks.fused import FusedUNet, fuse
from sidfast.networks.loading import load_teacher
from sidfast.training import speed

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher(tiny_teacher):
    return load_teacher(str(tiny_teacher))


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    monkeypatch.setattr(speed, "INTERPRETED", False)


def decide(teacher, stages=(0, 0), device=CPU, **section):
    return speed.decide_speed(Speed(**section), teacher, (4, 8, 8), 2, stages, torch.float32, device)


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
    shapes = speed.attention_shapes(teacher.unet, (4, 8, 8), 32, 2, CPU)
    layers = sum(type(m).__name__ == "BasicTransformerBlock" for m in teacher.unet.modules())
    assert {shape[:5] for shape in shapes} == {(2, 64, 64, 4, 4), (2, 64, 32, 4, 4)}
    assert sum(count for *_, count in shapes) == 2 * layers


def test_prepare(teacher):
    unet = copy.deepcopy(teacher.unet)
    assert type(decide(teacher).prepare(unet)) is type(teacher.unet) and not unet.is_gradient_checkpointing
    assert decide(teacher, gradient_checkpointing=True).prepare(unet).is_gradient_checkpointing
    assert isinstance(fuse(copy.deepcopy(teacher.unet)), FusedUNet)


def test_compile_takes_the_blocks_one_by_one(teacher, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(type(module).__name__))
    decide(teacher, compile=True).prepare(copy.deepcopy(teacher.unet))
    assert set(compiled) == {"ResnetBlock2D", "BasicTransformerBlock"}
