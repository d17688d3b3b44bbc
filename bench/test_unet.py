"""The UNet in its three roles: forward, forward with all gradients, forward with the gradient of its input alone."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from harness import compiled_blocks
from torch.utils.flop_counter import FlopCounterMode

from sidfast.accel.plan import compile_regions
from sidfast.accel.prepacked import refresh
from sidfast.accel.unet import fuse, unfuse

IMPLEMENTATIONS = ("fused", "eager", "eager channels_last", "compiled")
ROLES = ("forward", "forward and backward", "input gradient")


@pytest.fixture(scope="module")
def unet(machine):
    """SD 1.5's architecture with random weights; a small one on a CPU."""
    torch.manual_seed(0)
    options = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
    if not machine.gpu:
        options = {"sample_size": 8, "cross_attention_dim": 32, "block_out_channels": (32, 64), "attention_head_dim": 4,
                   "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                   "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    with torch.device(machine.device):
        return UNet2DConditionModel(**options).to(machine.dtype)


@pytest.fixture(scope="module")
def flop(unet, machine):
    """Of a forward pass over one image, by the UNet as diffusers has it (torch.compile skips code that is counted)."""
    c = unet.config
    x = torch.zeros(1, 4, c.sample_size, c.sample_size, device=machine.device, dtype=machine.dtype)
    prepare(unet, "eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(x, torch.ones(1, device=machine.device), x.new_zeros(1, 77, c.cross_attention_dim), return_dict=False)
    return counter.get_total_flops()


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("implementation, rows", [*((name, 16) for name in IMPLEMENTATIONS), ("fused", 8),
                                                  ("fused", 32)])
def test_unet(timed, machine, unet, flop, role, implementation, rows):
    if implementation in ("fused", "compiled") and not machine.gpu:
        pytest.skip("needs a GPU")
    n, c = rows if machine.gpu else 1, unet.config
    options = {"device": machine.device, "dtype": machine.dtype}
    x = torch.randn(n, 4, c.sample_size, c.sample_size, **options)
    text, dy = torch.randn(n, 77, c.cross_attention_dim, **options), torch.randn_like(x)
    t = torch.full((n,), 500, device=machine.device)
    prepare(unet, implementation)
    unet.requires_grad_(role == "forward and backward")
    x.requires_grad_(role == "input gradient")
    parameters = list(unet.parameters())

    def step():
        if role == "forward":
            with torch.no_grad():
                unet(x, t, text, return_dict=False)
            return
        y = unet(x, t, text, return_dict=False)[0]
        torch.autograd.grad(y, parameters if role == "forward and backward" else x, dy)

    if implementation == "compiled":
        assert compiled_blocks(step) == sum(module._compiled_call_impl is not None for module in unet.modules())
    name = "SD 1.5 UNet" if machine.gpu else "small UNet"
    timed(f"{name}, batch {n}, {role}", implementation, step, flop=flop * n * {
        "forward": 1, "forward and backward": 3, "input gradient": 2}[role])


def prepare(unet, implementation):
    """Undo what an earlier benchmark did to the UNet, and do what this one is about."""
    unfuse(unet)
    torch.backends.cudnn.benchmark = implementation != "fused"                   # as training has it
    for module in unet.modules():
        module._compiled_call_impl = None
    unet.to(memory_format=torch.contiguous_format if implementation == "eager" else torch.channels_last)
    if implementation == "fused":
        refresh(fuse(unet, attention="cudnn"))
    if implementation == "compiled":
        compile_regions(unet)
