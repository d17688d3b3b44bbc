"""The diffusers UNet on fused kernels: the same module, parameters and state dict, another forward pass.

`fuse` changes the classes of a UNet's modules in place to the ones below, `unfuse` changes them back. Activations stay
channels last from end to end ([N, H, W, C]) and travel with the statistics that the next GroupNorm needs. Covered: the
blocks of Stable Diffusion 1.x, 2.x and SDXL, with linear or convolutional projections and any block_out_channels.
"""

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

from sidfast.kernels.upsample import combine_taps
from sidfast.networks.attention import IMPLEMENTATIONS
from sidfast.networks.fused_ops import (
    conv,
    geglu,
    group_norm,
    joint_linear,
    layer_norm,
    linear,
    projections,
    upsample_conv,
)
from sidfast.networks.packed import Packed, channels_last, joined


class FusedResnet(Packed, ResnetBlock2D):
    """x + conv2(silu(norm2(conv1(silu(norm1(x))) + time embedding))), with a 1x1 shortcut where channels change."""

    def make_packed(self):
        """The weights [K, C1 + C2, 3, 3] and [K, K, 3, 3] of the two convolutions, channels last."""
        return channels_last(self.conv1.weight), channels_last(self.conv2.weight)

    def forward(self, x, stats, temb=None, skip=None, skip_stats=None):
        """x [N, H, W, C1], skip [N, H, W, C2] (as further channels), each with its statistics, temb [N, D] after SiLU
        or None -> y [N, H, W, K] and its statistics.

        conv1's bias and the time embedding shift whole channels: the second GroupNorm takes them as numbers.
        """
        packed1, packed2 = self.kept or (None, None)
        y, x, skip = group_norm(x, stats, self.norm1, silu=True, skip=skip, skip_stats=skip_stats)
        h, h_stats = conv(y, self.conv1.weight, packed1)
        if temb is None:
            shift = self.conv1.bias.expand(len(x), -1).contiguous()
        else:
            shift = F.linear(temb, self.time_emb_proj.weight, self.time_emb_proj.bias + self.conv1.bias)
        y, *_ = group_norm(h, h_stats, self.norm2, silu=True, shift=shift)
        if self.conv_shortcut is None:
            return conv(y, self.conv2.weight, packed2, self.conv2.bias, x)
        residual = joint_linear(x, skip, self.conv_shortcut.weight)
        return conv(y, self.conv2.weight, packed2, self.conv2.bias + self.conv_shortcut.bias, residual)


class FusedTransformer(Transformer2DModel):
    """The layers of attention on an image's positions, between two projections and around a residual path."""

    def forward(self, x, stats, text):
        """x [N, H, W, C] and its statistics, text [N, L, D] -> y [N, H, W, C] and its statistics."""
        y, x, _ = group_norm(x, stats, self.norm)
        h = linear(y.flatten(1, 2), self.proj_in.weight, self.proj_in.bias.detach())
        bias, residual = self.proj_in.bias, None
        for block in self.transformer_blocks:
            h, bias, residual = block(h, bias, residual, text)
        out = self.proj_out
        return conv((h + residual).view_as(x), out.weight, None, out.bias, x)


class FusedTransformerBlock(Packed, BasicTransformerBlock):
    """Self-attention, attention to the text, and GEGLU, each after a LayerNorm and added to its input."""

    attend = staticmethod(IMPLEMENTATIONS["math"])       # `fuse` sets the one wanted

    def make_packed(self):
        """The projections of self-attention as one [3C, C], those of the text to keys and values as one [2C, D]."""
        return joined(self._own_weights()), joined(self._text_weights())

    def _own_weights(self):
        return [m.weight for m in (self.attn1.to_q, self.attn1.to_k, self.attn1.to_v)]

    def _text_weights(self):
        return [self.attn2.to_k.weight, self.attn2.to_v.weight]

    def forward(self, x, bias_of_x, residual, text):
        """One layer on tokens x + residual [N, S, C]. Returns what it adds, the bias in that, and the rest of the sum.

        `bias_of_x`: the bias that x contains and that has no gradient yet (see `layer_norm`); None for the result's.
        """
        own, of_text = self.kept or (None, None)
        h, y = layer_norm(x, self.norm1, bias_of_x, residual)
        a = self._attention(self.attn1, *projections(y, own, *self._own_weights()))
        h, y = layer_norm(a, self.norm2, self.attn1.to_out[0].bias, h)
        a = self._attention(self.attn2, linear(y, self.attn2.to_q.weight), *projections(
            text, of_text, *self._text_weights()))
        h, y = layer_norm(a, self.norm3, self.attn2.to_out[0].bias, h)
        up, down = self.ff.net[0].proj, self.ff.net[2]
        y = geglu(linear(y, up.weight, up.bias.detach()), up.bias)
        return linear(y, down.weight, down.bias), None, h

    def _attention(self, attn, q, k, v):
        o = self.attend(*(t.unflatten(-1, (attn.heads, -1)) for t in (q, k, v)))
        out = attn.to_out[0]
        return linear(o.flatten(2), out.weight, out.bias.detach())


class FusedDownsample(Packed, Downsample2D):
    """A 3x3 convolution in steps of two."""

    def make_packed(self):
        """The weight [K, C, 3, 3] channels last."""
        return (channels_last(self.conv.weight),)

    def forward(self, x):
        """x [N, H, W, C] -> y [N, H/2, W/2, K], sizes rounded up, and its statistics."""
        return conv(x, self.conv.weight, *(self.kept or (None,)), self.conv.bias, stride=2)


class FusedUpsample(Packed, Upsample2D):
    """Nearest-neighbour upsampling and a 3x3 convolution: twice the size in one 2x2 convolution."""

    def make_packed(self):
        """The 2x2 kernel [4K, C, 2, 2] of `combine_taps`."""
        return (combine_taps(self.conv.weight),)

    def forward(self, x, height, width):
        """x [N, H, W, C] -> y [N, height, width, K] and its statistics."""
        weight, bias = self.conv.weight, self.conv.bias
        if (height, width) == (2 * x.shape[1], 2 * x.shape[2]):
            return upsample_conv(x, weight, *(self.kept or (None,)), bias)
        x = F.interpolate(x.permute(0, 3, 1, 2), size=(height, width), mode="nearest").permute(0, 2, 3, 1)
        return conv(x.contiguous(), weight, None, bias)


class FusedConvIn(Packed, nn.Conv2d):
    """The first convolution: from here on channels are last."""

    def make_packed(self):
        """The weight [K, C, 3, 3] channels last."""
        return (channels_last(self.weight),)

    def forward(self, x):
        """x [N, C, H, W] -> y [N, H, W, K] and its statistics."""
        return conv(x.permute(0, 2, 3, 1).contiguous(), self.weight, *(self.kept or (None,)), self.bias)


class FusedNormOut(nn.GroupNorm):
    """The last GroupNorm, with SiLU."""

    def forward(self, x, stats):
        """GroupNorm and SiLU: x [N, H, W, C] -> the same as [N, C, H, W] in memory format channels_last."""
        return group_norm(x, stats, self, silu=True)[0].permute(0, 3, 1, 2)


class FusedUNet(UNet2DConditionModel):
    """The whole: down, middle and up blocks, whose modules are those above."""

    def forward(self, sample, timestep, encoder_hidden_states, added_cond_kwargs=None, return_dict=True, **others):
        """sample [N, C, H, W], text [N, L, D] -> o [N, C, H, W] in memory format channels_last; arguments as diffusers
        has them.

        Raises ValueError for one of diffusers' further arguments unless it is None.
        """
        given = [name for name, value in others.items() if value is not None]
        if given:
            raise ValueError(f"the fused UNet takes no {', '.join(given)}")
        text = encoder_hidden_states.contiguous()
        emb = self.time_embedding(self.get_time_embed(sample, timestep))
        more = self.get_aug_embed(emb, text, added_cond_kwargs)
        temb = F.silu(emb if more is None else emb + more)

        h, stats = self.conv_in(sample)
        skips = [(h, stats)]
        for block in self.down_blocks:
            for resnet, transformer in _layers(block):
                h, stats = self._layer(resnet, transformer, text, h, stats, temb)
                skips.append((h, stats))
            for downsample in block.downsamplers or ():
                h, stats = downsample(h)
                skips.append((h, stats))
        first, *rest = self.mid_block.resnets
        h, stats = self._layer(first, None, text, h, stats, temb)
        for transformer, resnet in zip(self.mid_block.attentions, rest, strict=True):
            h, stats = self._run(transformer, h, stats, text)
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


def _layers(block):
    """A block's resnets, each with its transformer or None."""
    transformers = getattr(block, "attentions", None) or [None] * len(block.resnets)
    return zip(block.resnets, transformers, strict=True)


_FUSED = {ResnetBlock2D: FusedResnet, Transformer2DModel: FusedTransformer, Downsample2D: FusedDownsample,
          BasicTransformerBlock: FusedTransformerBlock, Upsample2D: FusedUpsample, UNet2DConditionModel: FusedUNet}


BLOCKS = [FusedResnet, FusedTransformer, FusedDownsample, FusedUpsample]
"""The modules that read the parameters of the modules inside them: ZeRO stage 3 must gather all of those at once."""


def fuse(unet, attention="math", checkpointing=False):
    """Make a UNet run on the fused kernels, in place, and return it; `attention`: a key of IMPLEMENTATIONS;
    `checkpointing`: whether the backward pass computes the activations of each module again.

    Raises ValueError, saying why, for a UNet that they do not cover (`cannot_fuse`).
    """
    reason = cannot_fuse(unet)
    if reason:
        raise ValueError(f"this UNet cannot run on the fused kernels: {reason}")
    for module in unet.modules():
        if type(module) in _FUSED:
            module.__class__ = _FUSED[type(module)]
        if isinstance(module, FusedTransformerBlock):
            module.attend = IMPLEMENTATIONS[attention]
    unet.conv_in.__class__, unet.conv_norm_out.__class__ = FusedConvIn, FusedNormOut
    unet.checkpointing = checkpointing
    return unet


def unfuse(unet):
    """The inverse of `fuse`, in place, and return it; a UNet that is not fused stays as it is."""
    plain = {fused: original for original, fused in _FUSED.items()} | {
        FusedConvIn: nn.Conv2d, FusedNormOut: nn.GroupNorm}
    for module in unet.modules():
        module.__class__ = plain.get(type(module), type(module))
        for name in ("attend", "kept"):
            module.__dict__.pop(name, None)
    unet.__dict__.pop("checkpointing", None)
    return unet


def cannot_fuse(unet):
    """What of a UNet the fused kernels do not cover, in a few words, or None."""
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
def attention_shapes(unet, latent_shape, text_length, rows, device):
    """Every attention of one pass over `rows` latents (C, H, W) and texts of `text_length` tokens: [(N, S, L, heads, d,
    times it occurs)], as `choose_attention` takes them. Leaves the UNet as diffusers has it.

    Raises ValueError for a UNet that the fused kernels do not cover.
    """
    seen = {}

    def attend(q, k, v):
        key = (rows, q.shape[1], k.shape[1], *q.shape[2:])
        seen[key] = seen.get(key, 0) + 1
        return IMPLEMENTATIONS["math"](q, k[:, :1], v[:, :1])                # any numbers of the right shape

    fuse(unet)
    for module in unet.modules():
        if hasattr(module, "attend"):
            module.attend = attend
    options = {"device": device, "dtype": unet.dtype}
    x = torch.zeros(1, *latent_shape, **options)
    text = torch.zeros(1, text_length, unet.config.cross_attention_dim, **options)
    unet(x, torch.zeros(1, device=device), text)
    unfuse(unet)
    return [(*key, count) for key, count in seen.items()]
