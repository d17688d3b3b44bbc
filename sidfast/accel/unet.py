"""The diffusers UNet on fused kernels: the same module, parameters and state dict, another forward pass.

`fuse` changes the classes of a UNet's modules in place to the ones here and in fused_blocks.py, `unfuse` changes them
back. Activations stay channels last from end to end. Covered: the blocks of Stable Diffusion 1.x, 2.x and SDXL, with
linear or convolutional projections and any block_out_channels.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel, UNet2DConditionOutput
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sidfast.accel.attention import IMPLEMENTATIONS
from sidfast.accel.unet_blocks import (
    FusedConvIn,
    FusedDownsample,
    FusedNormOut,
    FusedResnet,
    FusedTransformer,
    FusedTransformerBlock,
    FusedUpsample,
    repeat,
)


class FusedUNet(UNet2DConditionModel):
    """The whole: down, middle and up blocks, whose modules are those above.

    Guidance asks for every image with two texts. Until the first attention to the text both passes compute the same:
    images and timesteps come once, and are repeated there.
    """

    repeats_images = True

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor | float, encoder_hidden_states: torch.Tensor,
                added_cond_kwargs: dict | None = None, return_dict: bool = True, **others) -> Any:
        """sample [N, C, H, W], timesteps [N] or one for all, text [k N, L, D] -> o [k N, C, H, W] in memory format
        channels_last: all images with the first N texts, then with the next. Other arguments as diffusers has them;
        those of added_cond_kwargs have as many rows as text.

        Raises ValueError for one of diffusers' further arguments unless it is None.
        """
        given = [name for name, value in others.items() if value is not None]
        if given:
            raise ValueError(f"the fused UNet takes no {', '.join(given)}")
        text = encoder_hidden_states.contiguous()
        emb = self.time_embedding(self.get_time_embed(sample, timestep))
        more = self.get_aug_embed(emb, text, added_cond_kwargs)
        if more is not None:                             # (part of the text reaches all layers)
            sample, emb = repeat(sample, len(text)), repeat(emb, len(text)) + more
        temb = F.silu(emb)

        h, stats = self.conv_in(sample)
        skips = [(h, stats)]
        for block in self.down_blocks:
            for resnet, transformer in _layers(block):
                h, stats = self._layer(resnet, transformer, text, h, stats, temb)
                temb, skips = _match(len(h), temb, skips)
                skips.append((h, stats))
            for downsample in block.downsamplers or ():
                h, stats = downsample(h)
                skips.append((h, stats))
        first, *rest = self.mid_block.resnets
        h, stats = self._layer(first, None, text, h, stats, temb)
        for transformer, resnet in zip(self.mid_block.attentions, rest, strict=True):
            h, stats = self._run(transformer, h, stats, text)
            temb, skips = _match(len(h), temb, skips)
            h, stats = self._layer(resnet, None, text, h, stats, temb)
        for block in self.up_blocks:
            for resnet, transformer in _layers(block):
                h, stats = self._layer(resnet, transformer, text, h, stats, temb, *skips.pop())
            for upsample in block.upsamplers or ():
                h, stats = upsample(h, *skips[-1][0].shape[1:3])
        output = self.conv_out(self.conv_norm_out(h, stats))
        return UNet2DConditionOutput(output) if return_dict else (output,)

    def _layer(self, resnet, transformer, text, *inputs):
        h, stats = self._run(resnet, *inputs)
        return (h, stats) if transformer is None else self._run(transformer, h, stats, text)

    def _run(self, module, *inputs):
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=False)
        return module(*inputs)

    checkpointing = False                                # activations computed again in the backward pass


def _match(rows, temb, skips):
    """The time embedding and the skip connections with as many rows as the images have after a layer."""
    return repeat(temb, rows), [tuple(repeat(v, rows) for v in skip) for skip in skips]


def _layers(block):
    """A block's resnets, each with its transformer or None."""
    transformers = getattr(block, "attentions", None) or [None] * len(block.resnets)
    return zip(block.resnets, transformers, strict=True)


_FUSED = {ResnetBlock2D: FusedResnet, Transformer2DModel: FusedTransformer, Downsample2D: FusedDownsample,
          BasicTransformerBlock: FusedTransformerBlock, Upsample2D: FusedUpsample, UNet2DConditionModel: FusedUNet}


def fuse(unet: nn.Module, attention: str = "math", checkpointing: bool = False) -> nn.Module:
    """Make a UNet run on the fused kernels, in place, and return it; `attention`: a key of IMPLEMENTATIONS;
    `checkpointing`: whether the backward pass computes the activations of each module again.

    Raises ValueError, saying why, for a UNet that they do not cover (`fuse_blocker`).
    """
    reason = fuse_blocker(unet)
    if reason:
        raise ValueError(f"this UNet cannot run on the fused kernels: {reason}")
    for module in unet.modules():
        if type(module) in _FUSED:
            module.__class__ = _FUSED[type(module)]      # type: ignore[assignment]
        if isinstance(module, FusedTransformerBlock):
            module.attend = IMPLEMENTATIONS[attention]
    unet.conv_in.__class__, unet.conv_norm_out.__class__ = FusedConvIn, FusedNormOut
    unet.checkpointing = checkpointing                   # type: ignore[assignment]
    return unet


def unfuse(unet: nn.Module) -> nn.Module:
    """The inverse of `fuse`, in place, and return it; a UNet that is not fused stays as it is."""
    plain = {fused: original for original, fused in _FUSED.items()} | {
        FusedConvIn: nn.Conv2d, FusedNormOut: nn.GroupNorm}
    for module in unet.modules():
        module.__class__ = plain.get(type(module), type(module))
        for name in ("attend", "cache"):
            module.__dict__.pop(name, None)
    unet.__dict__.pop("checkpointing", None)
    return unet


def fuse_blocker(unet: nn.Module) -> str | None:
    """What of a network the fused kernels do not cover, in a few words, or None."""
    if not isinstance(unet, UNet2DConditionModel):
        return f"a {type(unet).__name__}, not a UNet"
    c, blocks = unet.config, {type(b).__name__ for b in (*unet.down_blocks, *unet.up_blocks, unet.mid_block)}
    other = blocks - {"CrossAttnDownBlock2D", "DownBlock2D", "UNetMidBlock2DCrossAttn", "CrossAttnUpBlock2D",
                      "UpBlock2D"}
    if other:
        return f"blocks {', '.join(sorted(other))}"
    wanted = {
        "act_fn": "silu", "resnet_time_scale_shift": "default", "class_embed_type": None, "num_class_embeds": None,
        "encoder_hid_dim_type": None, "time_embedding_act_fn": None, "dual_cross_attention": False,
        "only_cross_attention": False, "attention_type": "default", "center_input_sample": False,
        "downsample_padding": 1, "conv_in_kernel": 3, "conv_out_kernel": 3, "time_cond_proj_dim": None,
        "mid_block_only_cross_attention": None, "resnet_skip_time_act": False, "dropout": 0.0}
    for key, value in wanted.items():
        if c.get(key, value) != value:
            return f"{key} {c[key]!r}"
    for module in unet.modules():
        if isinstance(module, BasicTransformerBlock):
            biased = any(m.bias is not None for a in (module.attn1, module.attn2) for m in (a.to_q, a.to_k, a.to_v))
            if biased or not isinstance(module.ff.net[0], GEGLU):
                return "attention with biases, or a feed-forward part that is no GEGLU"
    if unet.conv_norm_out is None or c.get("mid_block_scale_factor", 1) != 1:
        return "no final norm, or a scaled middle"
    return None


@torch.no_grad()
def attention_shapes(unet: nn.Module, rows: int, run: Callable) -> list[tuple[int, ...]]:
    """Every attention of one pass over `rows` images: [(N, S, L, heads, d, times it occurs)], as `choose_attention`
    takes them. `run(unet)`: the pass, of one image. Leaves the UNet as diffusers has it.

    Raises ValueError for a UNet that the fused kernels do not cover.
    """
    seen: dict[tuple, int] = {}

    def attend(q, k, v):
        key = (rows, q.shape[1], k.shape[1], *q.shape[2:])
        seen[key] = seen.get(key, 0) + 1
        return IMPLEMENTATIONS["math"](q, k[:, :1], v[:, :1])                # any numbers of the right shape

    fuse(unet)
    for module in unet.modules():
        if hasattr(module, "attend"):
            module.attend = attend                       # type: ignore[assignment]
    run(unet)
    unfuse(unet)
    return [(*key, count) for key, count in seen.items()]
