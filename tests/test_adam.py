"""Adam with beta1 = 0 without a first moment: PyTorch's numbers, no memory of its own, checkpoints of both kinds."""

from types import SimpleNamespace

import pytest
import torch
from helpers_engine import optimize
from safetensors.torch import save_file
from test_plan import device  # noqa: F401

from sidfast.accel.unet import fuse
from sidfast.averages.ema import Ema
from sidfast.checkpoints.format import seal
from sidfast.checkpoints.store import _share, check_fits, engine_states, read_tensors, restore, snapshot
from sidfast.common.errors import UserError
from sidfast.config.schema import Adam, build_config
from sidfast.engines.adam import CheckedAdam, CheckedSecondMomentAdam, SecondMomentAdam
from sidfast.engines.engine import ENGINES, build_engine, engine_config, gather, master_weights, optimizer_step
from sidfast.teachers.load import load_teacher

# A flat shard, parameters of a UNet, and what vectors and blocks do not divide.
SHAPES = ((1_000_003,), (64, 32, 3, 3), (320, 77), (7,), (1,), ())
PLACES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
OPTIONS = {"lr": 1e-3, "eps": 1e-6}


def parameters(place, dtype):
    """Of all shapes; the convolution's weight channels last."""
    torch.manual_seed(0)
    values = [torch.randn(shape, device=place, dtype=dtype) for shape in SHAPES]
    values[1] = values[1].contiguous(memory_format=torch.channels_last)
    return [torch.nn.Parameter(v) for v in values]


def give_gradients(step, *lists):
    """Equal ones to each list of parameters, smaller than eps in the end; one parameter has none at times."""
    torch.manual_seed(step)
    for i, ps in enumerate(zip(*lists, strict=True)):
        gradient = torch.randn_like(ps[0]) * 10.0 ** (-2 * step)
        for p in ps:
            p.grad = None if i == 2 and step == 1 else gradient.to(p.dtype, copy=True)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.float64, 1e-14)], ids=str)
def test_equals_pytorch(place, dtype, bound):
    """Bit for bit what PyTorch's fused kernel makes, and to rounding what its plain one makes in float64."""
    ours, fused, plain = (parameters(place, dtype) for _ in range(3))
    plain = [torch.nn.Parameter(p.detach().double()) for p in plain]
    adam = SecondMomentAdam(ours, beta2=0.9, **OPTIONS)
    pytorch = [torch.optim.Adam(fused, betas=(0.0, 0.9), fused=True, **OPTIONS),
               torch.optim.Adam(plain, betas=(0.0, 0.9), foreach=False, **OPTIONS)]
    begun = [p.detach().double() for p in ours]
    for step in range(5):
        give_gradients(step, ours, fused, plain)
        for optimizer in (adam, *pytorch):
            optimizer.param_groups[0]["lr"] = 1e-3 / (1 + step)
            optimizer.step()
        for p, q, r, start in zip(ours, fused, plain, begun, strict=True):
            assert torch.equal(p, q) and (p.grad is None or torch.equal(p.grad, q.grad))
            assert adam.state[p].keys() == {"step", "exp_avg_sq"} or p.grad is None
            assert torch.equal(adam.state[p]["exp_avg_sq"], pytorch[0].state[q]["exp_avg_sq"])
            # the way that it went: to rounding of the parameters, which are of size 1
            assert ((p.double() - start) - (r - start)).abs().max() < bound
            v, w = adam.state[p]["exp_avg_sq"].double(), pytorch[1].state[r]["exp_avg_sq"]
            assert (v - w).norm() <= bound * w.norm()


@pytest.mark.parametrize("place", PLACES)
def test_a_step_needs_no_memory(place):
    """Nor does the first one make more than the second moment."""
    ours = [torch.nn.Parameter(p.detach().contiguous()) for p in parameters(place, torch.float32)]
    adam, size = SecondMomentAdam(ours, beta2=0.9, **OPTIONS), 4 * sum(p.numel() for p in ours)
    give_gradients(0, ours)
    assert size <= taken(adam.step, place) < 1.01 * size
    assert taken(adam.step, place) < 1e4


def taken(call, place):
    """Bytes that a call asks for in all (on a GPU: has at once, beyond what there was)."""
    if place == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return sum(max(0, e.nbytes()) for e in events)


@pytest.mark.parametrize("kind, options", [(CheckedAdam, {"betas": (0.5, 0.9)}), (CheckedSecondMomentAdam,
                                                                                 {"beta2": 0.9})])
def test_a_gradient_that_is_not_finite(kind, options):
    """Changes nothing; the step after it is as if it had not been."""
    ours, others = parameters("cpu", torch.float32), parameters("cpu", torch.float32)
    adam, other = kind(ours, **options, **OPTIONS), kind(others, **options, **OPTIONS)
    for step in range(3):
        give_gradients(step, ours, others)
        other.step()
        gradients = [p.grad for p in ours]
        ours[0].grad = torch.full_like(ours[0], torch.nan if step else torch.inf)
        before = [p.detach().clone() for p in ours]
        adam.step()
        assert adam.overflow and all(torch.equal(p, q) for p, q in zip(ours, before, strict=True))
        for p, g in zip(ours, gradients, strict=True):
            p.grad = g
        adam.step()
        assert not adam.overflow and all(torch.equal(p, q) for p, q in zip(ours, others, strict=True))


# ---- in DeepSpeed's engines: what checkpoints hold, and who goes on from them

def engine_of(teacher, beta1, stage, device, weights=None, offload=False, prepare=lambda unet: unet,  # noqa: F811
              precision="fp32"):
    """A generator's engine, of given weights."""
    zero = {"stage": stage} | ({"offload_optimizer": {"device": "cpu"}} if offload else {})
    config = build_config({"model": {"teacher": "x"}, "data": {"prompts": "shapes:train"},
                           "train": {"steps": 1, "batch_size": 2, "micro_batch": 2},
                           "deepspeed": {"zero_optimization": zero, "bf16": {"enabled": precision == "bf16"},
                                         "fp16": {"enabled": precision == "fp16"}}}, "test")
    unet = load_teacher(teacher).network
    unet.load_state_dict(weights or unet.state_dict())
    return build_engine(prepare(unet), Adam(lr=1e-3, beta1=beta1), engine_config(config, "generator", 1), device)


def take_steps(engine, count, dtype=torch.float32):
    for i in range(count):
        torch.manual_seed(i)
        x, text = torch.randn(2, 4, 8, 8, dtype=dtype), torch.randn(2, 77, 16, dtype=dtype)
        optimize(engine, lambda unet, x, text: unet(x, 5, text).sample.square().mean(), [(x, text)])


def whole_weights(engine):
    return torch.cat([v.flatten() for v in gather(engine, master_weights(engine)).values()])


@pytest.mark.parametrize("beta1", (0, 0.5))
@pytest.mark.parametrize("stage", (0, 1, 2, 3))
@pytest.mark.parametrize("precision", ("fp32", "bf16"))
def test_the_first_update(tiny_teacher, device, precision, stage, beta1):  # noqa: F811
    """It is the engine's first, and moves most weights by the learning rate, as Adam's first update does."""
    engine = engine_of(tiny_teacher, beta1, stage, device, precision=precision)
    before = whole_weights(engine)
    assert optimizer_step(engine) == 0
    take_steps(engine, 1, torch.bfloat16 if precision == "bf16" else torch.float32)
    assert optimizer_step(engine) == 1
    assert (whole_weights(engine) - before).abs().median().item() == pytest.approx(1e-3, rel=0.01)
    engine.destroy()


def save(folder, engine, networks=("generator",)):
    """A checkpoint of one engine, as each of `networks`; the generator's kinds of tensors."""
    folder.mkdir()
    files = snapshot(dict.fromkeys(networks, engine), Ema(engine, 1, None))
    for name, tensors in files.items():
        save_file(tensors, folder / name)
    (folder / "state.json").write_text(seal({"engines": engine_states({"generator": engine}),
                                             "files": dict.fromkeys(files)}))
    return {name.split("-")[0].removeprefix("generator.") for name in files if name.startswith("generator.")}


def goes_on(tiny_teacher, folder, device, stage, before, after, offload=(False, False)):  # noqa: F811
    """Two steps of one engine, then a third one of it and of one that has its checkpoint: weights of both after it."""
    kept = engine_of(tiny_teacher, before, stage, device, offload=offload[0])
    take_steps(kept, 2)
    kinds = save(folder / "step", kept)
    assert kinds == {"weights", "exp_avg_sq", "ema"} | ({"exp_avg"} if before > 0 or offload[0] else set())
    new = engine_of(tiny_teacher, after, stage, device, read_tensors(folder / "step", "generator", "weights"),
                    offload[1])
    restore(folder / "step", {"generator": new}, Ema(new, 1, None))
    kept.basic_optimizer.param_groups[0]["betas"] = (after, 0.999)
    weights = []
    for engine in (kept, new):
        take_steps(engine, 1)
        weights.append(whole_weights(engine))
        engine.destroy()
    return weights


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("before, after", [(0, 0), (0.5, 0.5), (0.5, 0)])
def test_going_on(tiny_teacher, tmp_path, device, stage, before, after):  # noqa: F811
    kept, new = goes_on(tiny_teacher, tmp_path, device, stage, before, after)
    assert torch.equal(kept, new) if before == after else (kept - new).abs().max() < 1e-6


@pytest.mark.parametrize("stage, prepare", [(0, fuse), (2, lambda unet: unet), (3, lambda unet: unet), (3, fuse)])
def test_processes_write_alike(tiny_teacher, device, stage, prepare):  # noqa: F811
    """Every parameter is written by one process, and no process has much more to write than another."""
    engine = engine_of(tiny_teacher, 0, stage, device, prepare=prepare)
    sizes = {name: value.numel() for name, value in gather(engine, master_weights(engine)).items()}
    for ranks in (1, 2, 3, 8):
        shares = [_share(engine, rank, ranks) for rank in range(ranks)]
        assert sorted(name for share in shares for name in share) == sorted(sizes)
        written = [sum(sizes[name] for name in share) for share in shares]
        assert max(written) - min(written) <= max(sizes.values())
        assert ranks != 2 or max(written) < 1.01 * min(written)
    engine.destroy()


@pytest.mark.slow
@pytest.mark.parametrize("offload", [(False, True), (True, False), (True, True)], ids=str)
def test_going_on_with_the_optimizer_elsewhere(tiny_teacher, tmp_path, device, offload):  # noqa: F811
    """DeepSpeed's Adam for the CPU keeps both moments, and needs but one (compiling it takes a minute or two)."""
    kept, new = goes_on(tiny_teacher, tmp_path, device, 2, 0, 0, offload)
    assert (kept - new).abs().max() < 1e-6


def test_momentum_cannot_come_from_nowhere(tiny_teacher, tmp_path, device):  # noqa: F811
    engine = engine_of(tiny_teacher, 0, 0, device)
    take_steps(engine, 1)
    save(tmp_path / "step", engine, ENGINES)
    unet = load_teacher(tiny_teacher).network
    check_fits(tmp_path / "step", unet, SimpleNamespace(generator=Adam(), fake_score=Adam()))
    with pytest.raises(UserError, match=r"^--resume \S*step: is of a run with optimizer.fake_score.beta1 = 0, [^\n]*$"):
        check_fits(tmp_path / "step", unet, SimpleNamespace(generator=Adam(), fake_score=Adam(beta1=0.9)))
    momentum = engine_of(tiny_teacher, 0.9, 0, device)
    with pytest.raises(KeyError):
        restore(tmp_path / "step", {"generator": momentum}, Ema(momentum, 1, None))
