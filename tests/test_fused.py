"""The fused UNet against diffusers' own: output, every gradient, state dict."""

import copy
import functools
import re

import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers_kernels import DEVICES, DTYPES, random_tensors
from helpers_latents import error
from torch import nn

from sidfast.accel.attention import IMPLEMENTATIONS, choose_attention
from sidfast.accel.prepacked import Prepacked, pass_layout, prepacked_bytes, refresh
from sidfast.accel.unet import fuse, fuse_blocker, unfuse
from sidfast.accel.unet_ops import add

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
ARCHITECTURES = {
    "sd15": {"cross_attention_dim": 12, "attention_head_dim": 2, "block_out_channels": (16, 24),
             "down_block_types": (CROSS, PLAIN), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")},
    "sd21": {"cross_attention_dim": 12, "attention_head_dim": (2, 4), "use_linear_projection": True,
             "block_out_channels": (16, 32), "down_block_types": (CROSS, CROSS),
             "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D")},
    "sdxl": {"cross_attention_dim": 12, "attention_head_dim": (2, 4), "use_linear_projection": True,
             "block_out_channels": (16, 24), "transformer_layers_per_block": (1, 2), "down_block_types": (PLAIN, CROSS),
             "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "addition_embed_type": "text_time",
             "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 6 * 4 + 5},
    "small": {"cross_attention_dim": 12, "attention_head_dim": 5, "block_out_channels": (15,), "layers_per_block": 1,
              "down_block_types": (CROSS,), "up_block_types": ("CrossAttnUpBlock2D",), "norm_num_groups": 3},
}


HALF = ARCHITECTURES["sd21"] | {"down_block_types": (PLAIN, CROSS),
                                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}


def unet_of(name):
    """A small UNet with nothing at its initial zeros and ones."""
    torch.manual_seed(0)
    architecture = HALF if name == "sd21, half" else ARCHITECTURES[name]         # (every kind of layer, fewer of them)
    options = {"sample_size": 4, "norm_num_groups": 4, "layers_per_block": 1} | architecture
    unet = UNet2DConditionModel(**options)
    with torch.no_grad():
        for p in unet.parameters():
            if p.ndim == 1:
                p.add_(0.2 * torch.randn_like(p))
    return unet


def inputs_of(unet, n=1, side=4):
    """x, t, text, the further conditions of SDXL, and dy."""
    g = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(n, 4, side, side, generator=g) for _ in range(2))
    text = torch.randn(n, 5, unet.config.cross_attention_dim, generator=g)
    more = {}
    if unet.config.addition_embed_type:
        more = {"added_cond_kwargs": {"text_embeds": torch.randn(n, 5, generator=g),
                                      "time_ids": torch.randn(n, 6, generator=g)}}
    return x, torch.linspace(3, 990, n), text, more, dy


def run(unet, x, t, text, more, dy):
    """Output, dx, and the gradients of the parameters that want one, by name."""
    x = x.detach().requires_grad_()
    y = unet(x, t, encoder_hidden_states=text, return_dict=False, **more)[0]
    named = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    dx, *grads = torch.autograd.grad(y, [x, *named.values()], dy)
    return {"y": y.detach(), "dx": dx} | dict(zip(named, grads, strict=True))


def to(device, dtype, x, t, text, more, dy):
    x, text, dy = (v.to(device, dtype) for v in (x, text, dy))
    more = {k: {name: v.to(device, dtype) for name, v in group.items()} for k, group in more.items()}
    return x, t.to(device), text, more, dy


@functools.cache
def result_of(name, device="cpu"):
    """Of the fused UNet in fp32; several tests compare with it."""
    unet = unet_of(name).to(device)
    return run(fuse(unet), *to(device, torch.float32, *inputs_of(unet)))


@pytest.fixture
def exact(monkeypatch):
    """fp32 means fp32: no TensorFloat-32 in cuDNN's convolutions, which PyTorch takes unless told."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fused_unet(name, device, exact):
    """In fp32: output and every gradient are those of diffusers' UNet in float64."""
    unet = unet_of(name)
    want = run(copy.deepcopy(unet).double(), *to("cpu", torch.float64, *inputs_of(unet)))
    got = result_of(name, device)
    assert got.keys() == want.keys() and len(got) > 40
    scale = max(v.norm() for k, v in want.items() if k not in ("y", "dx"))
    for key, value in want.items():
        if value.norm() > 1e-6 * scale:
            assert error(got[key], value) <= 2e-5, key
        else:                                            # (a bias before a norm of groups of one channel has none)
            assert got[key].norm() <= 1e-5 * scale, key


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["sd15"])
def test_fused_unet_in_bf16(name, device):
    """Output and all gradients together are no further from fp32 than diffusers' own bf16."""
    unet = unet_of(name).bfloat16().float()              # the same rounded weights
    want = run(copy.deepcopy(unet).to(device), *to(device, torch.float32, *inputs_of(unet)))
    low = to(device, torch.bfloat16, *inputs_of(unet))
    plain, got = run(copy.deepcopy(unet).to(device, torch.bfloat16), *low), run(
        fuse(unet.to(device, torch.bfloat16)), *low)
    allowed = 1.1 if device == "cuda" else 2.2           # (Triton's interpreter cuts off instead of rounding)
    for keys in (["y"], ["dx"], [k for k in want if k not in ("y", "dx")]):
        flat = [torch.cat([r[k].flatten().float() for k in keys]) for r in (got, plain, want)]
        assert error(flat[0], flat[2]) <= allowed * error(flat[1], flat[2]), keys[0]


@pytest.mark.parametrize("device", DEVICES)
def test_frozen_unet_gives_the_same_input_gradient(device, exact):
    unet = fuse(unet_of("small").to(device))
    want = result_of("small", device)
    got = run(unet.requires_grad_(False), *to(device, torch.float32, *inputs_of(unet)))
    assert list(got) == ["y", "dx"]
    assert torch.equal(got["y"], want["y"]) and torch.equal(got["dx"], want["dx"])


KINDS = {"biases": r"\.bias$", "weights": r"\.weight$", "queries": r"\.to_q\.", "norms' weights": r"norm\d?\.weight$"}


@pytest.mark.parametrize("kind", KINDS)
def test_some_parameters_trained(kind):
    """They have their gradients, whatever else is frozen."""
    unet, want = fuse(unet_of("small")), result_of("small")
    for name, p in unet.named_parameters():
        p.requires_grad_(re.search(KINDS[kind], name) is not None)
    got = run(unet, *inputs_of(unet))
    assert len(got) > 4
    assert all(torch.equal(value, want[key]) for key, value in got.items())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add(dtype, device):
    """The last sum of a block: rounded once; the gradient may lie in memory in any way."""
    v = random_tensors(device, dtype, x=(2, 35, 66), bias_of_x=(66,), residual=(2, 35, 66))
    dy = random_tensors(device, dtype, seed=1, dy=(2, 35, 132))["dy"].detach()[..., ::2]
    y, grads = add(**v), torch.autograd.grad(add(**v), list(v.values()), dy)
    exact = sum(t.detach().double() for t in v.values())
    spacing = exact.abs() * torch.finfo(dtype).eps       # (to the nearest on a GPU, cut off by the interpreter)
    assert y.dtype == dtype and ((y.double() - exact).abs() <= spacing + 1e-6).all()     # (of sums in fp32 themselves)
    assert torch.equal(grads[0], dy) and torch.equal(grads[2], dy)
    assert error(grads[1], dy.double().sum((0, 1))) < 2 * torch.finfo(dtype).eps


def test_packed_weights():
    """Kept or made in each pass: the same bits; after a change of the parameters `refresh` brings them up to date."""
    unet = fuse(unet_of("sd21, half"))
    inputs = inputs_of(unet)
    want = run(unet, *inputs)
    refresh(unet)
    kept = [(m.cache, [t.data_ptr() for t in m.cache]) for m in unet.modules() if isinstance(m, Prepacked)]
    assert len(kept) > 10
    assert all(torch.equal(a, b) for a, b in zip(want.values(), run(unet, *inputs).values(), strict=True))
    with torch.no_grad():
        for p in unet.parameters():
            p.mul_(1.1)
    want = run(fuse(unfuse(copy.deepcopy(unet))), *inputs)
    refresh(unet)
    assert all(torch.equal(a, b) for a, b in zip(want.values(), run(unet, *inputs).values(), strict=True))
    assert all([t.data_ptr() for t in tensors] == places for tensors, places in kept)
    assert not any(hasattr(m, "kept") for m in unfuse(unet).modules())


@pytest.mark.parametrize("name, frozen", [("small", False), ("sd21, half", True)])
def test_a_pass_saves_no_copies_of_weights(name, frozen):
    """For its backward pass: ZeRO stage 3 could not take back the memory of weights between the two."""
    unet = fuse(unet_of(name)).requires_grad_(not frozen)
    x, t, text, _, dy = inputs_of(unet)

    def saved_bytes(kept):
        taken = {v.untyped_storage().data_ptr() for v in (*unet.parameters(), *kept)}
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v) or v, lambda v: v):
            unet(x.requires_grad_(), t, text).sample.backward(dy)
        sizes = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in saved}
        return sum(size for place, size in sizes.items() if place not in taken)

    made_in_passes = saved_bytes(())
    refresh(unet)
    assert made_in_passes == saved_bytes([v for m in unet.modules() if isinstance(m, Prepacked) for v in m.cache])


def test_pass_layout_saves_the_copies():
    """Of convolutions without an upsampling before them; output and input gradient stay the same."""
    unet, want = fuse(unet_of("small").requires_grad_(False)), result_of("small")
    refresh(unet)
    of_convolutions = sum(m.weight.nbytes for m in unet.modules() if isinstance(m, nn.Conv2d)
                          and m.kernel_size == (3, 3) and m is not unet.conv_out)
    copies = prepacked_bytes(unet)
    laid_out = fuse(pass_layout(unfuse(unet)))
    refresh(laid_out)
    assert prepacked_bytes(laid_out) == copies - of_convolutions
    got = run(laid_out, *inputs_of(laid_out))
    for name in ("y", "dx"):
        assert error(got[name], want[name]) < 1e-6


def test_checkpointing_changes_nothing():
    unet, want = unet_of("small"), result_of("small")
    got = run(fuse(unet, checkpointing=True), *inputs_of(unet))
    assert all(torch.equal(got[k], want[k]) for k in want)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["small", "sd21, half", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_images_with_two_texts_each(name, device, exact):
    """Output and gradients of images that come once, with two texts, are those of images that come twice."""
    unet = unet_of(name).to(device)
    x, t, text, more, dy = to(device, torch.float32, *inputs_of(unet, n=2))
    texts, dys = torch.cat([text.flip(1), text]), torch.cat([dy, -2 * dy])
    more = {k: {name: torch.cat([v, v]) for name, v in group.items()} for k, group in more.items()}
    want = run(copy.deepcopy(unet), torch.cat([x, x]), torch.cat([t, t]), texts, more, dys)
    want["dx"] = want["dx"][:2] + want["dx"][2:]
    unet = fuse(unet, checkpointing=name == "small")
    got = run(unet, x, t, texts, more, dys)
    scale = max(v.norm() for k, v in want.items() if k not in ("y", "dx"))
    for key, value in want.items():
        assert error(got[key], value) <= 2e-5 or (got[key] - value).norm() <= 1e-5 * scale, key


def test_odd_sizes():
    """Latents whose side does not halve evenly, as diffusers handles them, and more than one of them."""
    unet = unet_of("sd15")
    inputs = inputs_of(unet, n=2, side=3)
    want, got = run(copy.deepcopy(unet), *inputs), run(fuse(unet), *inputs)
    assert error(got["y"], want["y"]) < 1e-5 and error(got["dx"], want["dx"]) < 1e-5


def test_fusing_keeps_the_module():
    """Parameters and state dict stay; `unfuse` gives back diffusers' UNet, which saves under its own name."""
    unet = unet_of("sd15")
    before, x = copy.deepcopy(unet), inputs_of(unet)
    fused = fuse(unet, attention="math", checkpointing=True)
    assert fused is unet and list(fused.state_dict()) == list(before.state_dict())
    back = unfuse(copy.deepcopy(fused))
    assert {type(m) for m in back.modules()} == {type(m) for m in before.modules()}
    assert {k for m in back.modules() for k in vars(m)} == {k for m in before.modules() for k in vars(m)}
    assert torch.equal(run(back, *x)["y"], run(before, *x)["y"])


@pytest.mark.parametrize("changes, reason", [
    ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift 'scale_shift'"),
    ({"down_block_types": ("AttnDownBlock2D",), "up_block_types": ("AttnUpBlock2D",)}, "AttnDownBlock2D, AttnUp"),
    ({"act_fn": "gelu"}, "act_fn 'gelu'")], ids=str)
def test_what_cannot_be_fused(changes, reason):
    unet = UNet2DConditionModel(**({"sample_size": 8, "norm_num_groups": 5} | ARCHITECTURES["small"] | changes))
    assert reason in fuse_blocker(unet)
    with pytest.raises(ValueError, match="cannot run on the fused kernels"):
        fuse(unet)
    assert type(unet) is UNet2DConditionModel


@pytest.mark.parametrize("device", DEVICES)
def test_attention_is_chosen_among_those_that_are_right(device, monkeypatch):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    monkeypatch.setitem(IMPLEMENTATIONS, "wrong", lambda q, k, v: IMPLEMENTATIONS["math"](q, k, v.flip(1)))
    results = choose_attention([(2, 64, 64, 2, 40, 3), (2, 64, 77, 2, 40, 3)], dtype, torch.device(device))
    times = [v for v in results.values() if not isinstance(v, str)]
    assert times and times == sorted(times) and min(times) > 0
    assert not isinstance(next(iter(results.values())), str) and results["wrong"].startswith("wrong: relative error of")
