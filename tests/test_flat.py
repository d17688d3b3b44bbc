"""A network's parameters end to end: same values, memory layout and gradients; neighbours are one matrix."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from sidfast.accel.prepacked import concat_rows, pass_layout
from sidfast.engines import flat as module
from sidfast.engines.flat import FlatParameters
from sidfast.engines.module import EngineModule


def build():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), block_out_channels=(4, 8),
        up_block_types=("UpBlock2D", "UpBlock2D"), layers_per_block=1, cross_attention_dim=12, attention_head_dim=2,
        norm_num_groups=2)


@pytest.mark.parametrize("bucket", (1, 700, 2**26))
def test_views(monkeypatch, bucket):
    monkeypatch.setattr(module, "BUCKET", bucket)
    unet = pass_layout(build())
    before = {name: (p.detach().clone(), p.stride()) for name, p in unet.named_parameters()}
    flat = FlatParameters(unet)
    assert (len(flat.buckets) == 1) is (bucket == 2**26)
    for name, p in unet.named_parameters():
        assert torch.equal(p, before[name][0]) and p.stride() == before[name][1]
        assert p.storage_offset() % 64 == 0 and p.data_ptr() % 16 == 0
    with torch.no_grad():
        for one in flat.buckets:
            one.mul_(2)
    assert all(torch.equal(p, 2 * before[name][0]) for name, p in unet.named_parameters())
    assert {name for name, _ in flat.named(flat.buckets)} == set(before)
    assert sum(c.count_nonzero() for c in flat.buckets) == sum(p.count_nonzero() for p in unet.parameters())
    flat.bfloat16()
    flat.bind()
    assert {p.dtype for p in unet.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("flat", (False, True))
def test_hooks_see_where_a_pass_begins(flat):
    """Those of an engine at ZeRO stage 3, also for a pass that is not the engine's own."""
    unet, begun = build(), []
    trained = EngineModule(unet, flat)
    trained.register_forward_pre_hook(lambda *_: begun.append(1))
    x, text = torch.randn(1, 4, 4, 4), torch.randn(1, 3, 12)
    got = trained.denoiser(x, 5, encoder_hidden_states=text).sample
    assert torch.equal(got, unet(x, 5, text).sample) and len(begun) == (not flat)


def test_neighbours_are_one_matrix():
    unet = build()
    apart = unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1
    weights = [apart.to_q.weight, apart.to_k.weight, apart.to_v.weight]
    want = torch.cat(weights)
    assert torch.equal(concat_rows(weights), want) and concat_rows(weights).data_ptr() != weights[0].data_ptr()
    flat = FlatParameters(unet)
    assert torch.equal(concat_rows(weights), want) and concat_rows(weights).data_ptr() == weights[0].data_ptr()
    assert concat_rows(weights[::-1]).data_ptr() != weights[-1].data_ptr() and len(flat.buckets) == 1
