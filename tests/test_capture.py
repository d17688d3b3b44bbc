"""What a CUDA graph cannot hold does not happen inside an update: seen on the CPU, before any GPU refuses it."""

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from helpers_method import objective_of, random_batch, setting
from sidfast.kernels.backend import INTERPRETED
from torch.utils._python_dispatch import TorchDispatchMode

from sidfast.accel.prepacked import refresh
from sidfast.accel.unet import fuse
from sidfast.config.sections import Synthetic
from sidfast.engines.update import fake_score_update, generator_update
from sidfast.method.synthetic import build_source, capture_blocker

# A constant from a Python list (on a GPU: a copy from host memory), a value read by the host, a size that depends on
# values, a random number (of another generator state each time).
FORBIDDEN = {torch.ops.aten.lift_fresh, torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero,
             torch.ops.aten.masked_select, torch.ops.aten.randn, torch.ops.aten.rand, torch.ops.aten.bernoulli_}


class Watch(TorchDispatchMode):
    """Collects the forbidden operators that run inside the block."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in FORBIDDEN:
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def small(seed, _):
    """Every kind of block, once."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), block_out_channels=(4, 8),
        up_block_types=("UpBlock2D", "UpBlock2D"), layers_per_block=1, cross_attention_dim=12, attention_head_dim=2,
        norm_num_groups=2)


@pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter is off")
@pytest.mark.parametrize("update, engine", [(generator_update, "generator"), (fake_score_update, "fake_score")],
                         ids=["generator", "fake_score"])
def test_passes_can_be_captured(update, engine):
    networks, batch, *_ = setting(n=1, make=small, shape=(4, 4, 4), text_width=12)
    for unet in (networks.generator.module.network, networks.fake_score.module.network, networks.teacher):
        refresh(fuse(unet))
    step = update(networks, objective_of())
    keep = torch.ones_like(batch.dropped)
    unet = getattr(networks, engine).module.network
    for _ in ("warm-up", "capture"):
        with Watch() as watch:
            loss, *_ = step.compute(unet, batch, keep)
            gradients = torch.autograd.grad(loss, list(unet.parameters()), allow_unused=True)
        assert any(g is not None and g.abs().max() > 0 for g in gradients)
    assert watch.seen == []                              # (of the second pass: what the first keeps may be made there)


@pytest.mark.parametrize("options", [
    {"source": "multistep", "steps": 3}, {"degradation": "blur", "strength": 0.7},
    {"source": "multistep", "steps": 2, "degradation": "noise", "strength": 0.3},
    {"teacher_share": 0.3, "teacher_steps": 3, "teacher_guidance": 1.5}], ids=str)
def test_sources_can_be_captured(options):
    section, objective = Synthetic(**options), objective_of()
    assert capture_blocker(section) is None
    networks, *_ = setting(make=small)
    source = build_source(section, networks.generator.module.denoiser, networks.teacher, objective, {},
                          lambda: DDIMScheduler(clip_sample=False))
    batch = random_batch(1, shape=(4, 4, 4), text_width=12, num_extra_noise=source.num_extra_noise)
    for _ in ("warm-up", "capture"):
        with torch.no_grad(), Watch() as watch:
            images = source(batch)
        assert images.isfinite().all()
    assert watch.seen == []


def test_the_watch_sees_what_it_should():
    with Watch() as watch:
        torch.tensor([1.0, 2.0]).sum().item()
    assert watch.seen == ["aten.lift_fresh.default", "aten._local_scalar_dense.default"]
