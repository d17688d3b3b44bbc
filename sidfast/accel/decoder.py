"""A VAE's decoder on the fused kernels: the same modules and parameters, another forward pass.

Decoding takes several times as long as the one pass of the UNet before it. Channels last from end to end, norms from
the statistics that convolutions hand over, upsampling and its convolution in one, as in fused.py.
"""

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn import functional as F

from sidfast.accel.prepacked import Prepacked
from sidfast.accel.unet_blocks import FusedConvIn, FusedNormOut, FusedResnet, FusedUpsample
from sidfast.accel.unet_ops import conv, group_norm


class FusedDecoderAttention(Prepacked, Attention):
    """Attention of all positions to all, after a GroupNorm and added to its input."""

    def prepack(self) -> tuple[torch.Tensor, ...]:
        """The three projections as one: weight [3C, C] and bias [3C]."""
        parts = (self.to_q, self.to_k, self.to_v)
        return torch.cat([m.weight for m in parts]), torch.cat([m.bias for m in parts])

    def forward(self, x: torch.Tensor, stats: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [N, H, W, C] and its statistics -> y [N, H, W, C] and its statistics. For inference: no gradients reach the
        projections."""
        y, x, _ = group_norm(x, stats, self.group_norm)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for t in F.linear(y.flatten(1, 2), *(self.cache or self.prepack())).chunk(3, -1))
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out = self.to_out[0]
        return conv(a.reshape(x.shape), out.weight, None, out.bias, x)


class FusedDecoder(Decoder):
    """Latents to pixels."""

    def forward(self, sample: torch.Tensor, latent_embeds: torch.Tensor | None = None) -> torch.Tensor:
        """sample [N, C, H, W] -> [N, 3, 8H, 8W] (for three upsamplings) in memory format channels_last."""
        h, stats = self.conv_in(sample)
        first, *rest = self.mid_block.resnets
        h, stats = first(h, stats)
        for attention, resnet in zip(self.mid_block.attentions, rest, strict=True):
            if attention is not None:
                h, stats = attention(h, stats)
            h, stats = resnet(h, stats)
        for block in self.up_blocks:
            for resnet in block.resnets:
                h, stats = resnet(h, stats)
            for upsample in block.upsamplers or ():
                h, stats = upsample(h, 2 * h.shape[1], 2 * h.shape[2])
        return self.conv_out(self.conv_norm_out(h, stats))


def fuse_decoder(vae: nn.Module) -> nn.Module:
    """Make the decoder of an AutoencoderKL run on the fused kernels, in place, for inference; returns the VAE.

    Raises ValueError, saying why, for one that they do not cover (`decoder_fuse_blocker`).
    """
    reason = decoder_fuse_blocker(vae)
    if reason:
        raise ValueError(f"this VAE cannot run on the fused kernels: {reason}")
    fused = {ResnetBlock2D: FusedResnet, Attention: FusedDecoderAttention, Upsample2D: FusedUpsample}
    decoder = vae.decoder
    for module in decoder.modules():
        module.__class__ = fused.get(type(module), type(module))
    decoder.__class__ = FusedDecoder
    decoder.conv_in.__class__, decoder.conv_norm_out.__class__ = FusedConvIn, FusedNormOut
    return vae


def decoder_fuse_blocker(vae: nn.Module) -> str | None:
    """What of a VAE's decoder the fused kernels do not cover, in a few words, or None."""
    decoder = getattr(vae, "decoder", None)
    if type(decoder) is not Decoder:
        return f"a decoder of type {type(decoder).__name__}"
    other = {type(b).__name__ for b in decoder.up_blocks} - {"UpDecoderBlock2D"}
    if other:
        return f"blocks {', '.join(sorted(other))}"
    if vae.config.act_fn != "silu" or not isinstance(decoder.conv_norm_out, torch.nn.GroupNorm):
        return "another activation than silu, or another norm than GroupNorm"
    for m in decoder.modules():
        if isinstance(m, ResnetBlock2D) and m.output_scale_factor != 1:
            return "scaled residual blocks"
        if isinstance(m, Attention) and (m.group_norm is None or m.spatial_norm is not None or not m.residual_connection
                                         or m.rescale_output_factor != 1 or m.to_q.bias is None):
            return "attention of another kind than Stable Diffusion's"
    return None
