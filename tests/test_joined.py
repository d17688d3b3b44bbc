"""A fused UNet whose blocks have one parameter each: the same passes, and nothing kept of a block's weights."""

import pytest
import torch
from test_fused import inputs_of, run, unet_of

from sidfast.accel.unet import fuse
from sidfast.accel.unet_blocks import FusedResnet
from sidfast.engines.blocks import FlatBlock, flatten_blocks, param_slices


def joined_of(name, checkpointing=False):
    return flatten_blocks(fuse(unet_of(name), checkpointing=checkpointing))


def by_name(unet, tensors):
    """Of tensors shaped like a UNet's parameters: the parts, by the names that these had."""
    return {place.name: place.view(whole) for (_, found), whole in zip(param_slices(unet), tensors, strict=True)
            for place in found}


@pytest.mark.parametrize("name, checkpointing", [("small", False), ("small", True), ("sd21, half", False)])
def test_the_same_passes(name, checkpointing, monkeypatch):
    """Output and every gradient, by the old names; checkpointing computes a block again in the backward pass."""
    plain = fuse(unet_of(name))
    want, unet = run(plain, *inputs_of(plain)), joined_of(name, checkpointing)
    forward, passes = FusedResnet.forward, []
    monkeypatch.setattr(FusedResnet, "forward", lambda self, *inputs: passes.append(self) or forward(self, *inputs))
    blocks = [module for module in unet.modules() if isinstance(module, FlatBlock)]
    assert len(blocks) > 4 and len(list(unet.parameters())) < len(list(plain.parameters())) / 2
    got = run(unet, *inputs_of(unet))
    assert len(passes) == len(set(passes)) * (2 if checkpointing else 1)
    parameters = dict(unet.named_parameters())
    got = {"y": got["y"], "dx": got["dx"]} | by_name(unet, [got[name] for name in parameters])
    assert got.keys() == want.keys()
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


def test_names_and_weights_stay():
    plain, unet = unet_of("sd21, half"), joined_of("sd21, half")
    got = by_name(unet, list(unet.parameters()))
    want = dict(plain.named_parameters())
    assert got.keys() == want.keys() and all(torch.equal(got[name], p) for name, p in want.items())
    starts = [place.view(whole).data_ptr() - whole.data_ptr() for whole, found in param_slices(unet) for place in found]
    assert all(start % (64 * 4) == 0 for start in starts)                        # (elements of fp32)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_pass_keeps_no_weights_of_blocks(frozen):
    """Between the two passes somebody may take a block's parameter back, and bring it again elsewhere in memory."""
    unet = joined_of("small").requires_grad_(not frozen)
    x, t, text, _, dy = inputs_of(unet)
    want = run(unet, x, t, text, {}, dy)
    x = x.requires_grad_()
    blocks = [module for module in unet.modules() if isinstance(module, FlatBlock)]
    for place, block in enumerate(blocks):               # (somewhere in memory that is others' as well)
        block.joined.data = within(block.joined.data, 8 * place)
    y = unet(x, t, text).sample
    brought = [within(block.joined.detach(), 64) for block in blocks]
    for block in blocks:
        block.joined.data.fill_(torch.nan)               # what is saved of the old memory would show
        block.joined.data = torch.empty(0)
    for block, whole in zip(blocks, brought, strict=True):
        block.joined.data = whole
    named = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    dx, *grads = torch.autograd.grad(y, [x, *named.values()], dy)
    assert torch.equal(dx, want["dx"])
    assert all(torch.equal(grad, want[name]) for name, grad in zip(named, grads, strict=True))


def within(tensor, place):
    """A copy at a place in a larger one."""
    return torch.cat([tensor.new_full((place,), torch.nan), tensor])[place:]
