"""What `sidfast plan` counts, against live engines, measured memory, and PyTorch's own counters."""

import copy
import gc
from types import SimpleNamespace

import pytest
import torch
from conftest import process_alone
from deepspeed import comm
from diffusers import UNet2DConditionModel
from helpers_engine import optimize
from torch.utils.flop_counter import FlopCounterMode

from sidfast.config.schema import Adam, build_config
from sidfast.engines.engine import build_engine, engine_config
from sidfast.method.updates import Objective
from sidfast.planning import footprint, memory
from sidfast.teachers.base import Teacher
from sidfast.teachers.load import load_meta_teacher, load_teacher
from sidfast.teachers.paths import DiscreteBetas
from sidfast.teachers.sd import StableDiffusion
from sidfast.training import launch

SCHEDULE = DiscreteBetas(torch.linspace(0.999, 0.005, 1000))
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


TEACHER = Teacher(StableDiffusion(), None, {
    "unet": unets("meta")["teacher"], "tokenizer": SimpleNamespace(model_max_length=TEXT[0]),
    "text_encoder": SimpleNamespace(config=None)}, SCHEDULE, None)
CONDITIONS = TEACHER.conditions


def objective(device, *kappas):
    return Objective(SCHEDULE.to(device), TEACHER.family.predict, *(kappas or (1.5,) * 4))


@pytest.mark.parametrize("kappas", [pytest.param((1.5,) * 4, marks=pytest.mark.slow), (1.5, 1, 1, 3.0)], ids=str)
def test_flops(kappas):
    """Of the whole updates, of PyTorch's counter, and of the short way, all the same."""
    nets = unets("meta")
    total = 0
    for name in footprint.UPDATES:
        found = footprint.measure_update(name, nets, objective("meta", *kappas), LARGE, CONDITIONS, torch.float32)
        total += found.flops
    assert total == pytest.approx(footprint.image_flops(TEACHER, LARGE, kappas), rel=1e-9)
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
    nets = unets("meta", checkpointing=checkpointing)
    counted = footprint.measure_update(name, nets, objective("meta"), LARGE, CONDITIONS, torch.float32)
    nets = unets("cpu", checkpointing=checkpointing)
    footprint._run(name, nets, objective("cpu"), LARGE, CONDITIONS, torch.float32, 2)                     # warm up
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        footprint._run(name, nets, objective("cpu"), LARGE, CONDITIONS, torch.float32, 4)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    assert counted.peak(4) == pytest.approx(peak, rel=0.1)
    without = footprint.measure_update(name, unets("meta"), objective("meta"), LARGE, CONDITIONS, torch.float32)
    assert not checkpointing or counted.peak(64) < 0.6 * without.peak(64)


def test_the_peak_is_known_for_every_micro_batch():
    """From two of them: the same as measured at a third."""
    at_two = footprint.measure_update("generator", unets("meta"), objective("meta"), LARGE, CONDITIONS, torch.float32)
    timeline, _ = footprint._run("generator", unets("meta"), objective("meta"), LARGE, CONDITIONS, torch.float32, 7)
    assert at_two.peak(7) == max(map(sum, timeline))
    assert at_two.peak(7, gradients=False) == max(beside + rest for _, beside, rest in timeline)
    assert at_two.peak(7, gradients=False, beside=False) == max(rest for _, _, rest in timeline)
    assert at_two.beside(7) == max(beside for _, beside, _ in timeline) > 0.2 * at_two.peak(7)
    assert max(own for own, _, _ in timeline) == 4 * at_two.parameters


@pytest.fixture(scope="module")
def device():
    """This process as a group of one."""
    with pytest.MonkeyPatch.context() as patch:
        process_alone(patch)
        patch.setenv("LOCAL_WORLD_SIZE", "2")
        gc.freeze()                                      # (`storages` looks through what comes from now on)
        yield launch.join()
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
        engine.backward(engine(engine.summed.flush))
        gone = zero.width * 2 * P * (stage == 2 and bf16)                # stage 2 gives both whole gradients back
        assert kept() == pytest.approx(resident + memory.during_flush(zero, P) - gone, rel=0.03)
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
    shapes, teacher = load_meta_teacher(str(tiny_teacher)), load_teacher(str(tiny_teacher))
    for name in ("unet", "vae", "text_encoder"):
        got, want = shapes.parts[name], teacher.parts[name]
        assert {k: v.shape for k, v in got.named_parameters()} == {k: v.shape for k, v in want.named_parameters()}
        assert all(p.is_meta for p in got.parameters())
    assert {k: v.shape for k, v in shapes.conditions(3).items()} == {
        k: v.shape for k, v in teacher.encode(teacher.tokenize(["", "a", "b"]), (16, 16)).items()}
