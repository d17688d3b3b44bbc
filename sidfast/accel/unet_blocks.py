"""The blocks of the fused UNet: each a diffusers module with the same parameters and another forward pass.

Activations are channels last ([N, H, W, C]) and travel with the statistics that the next GroupNorm needs.
"""

from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn import functional as F

from sidfast.accel.attention import IMPLEMENTATIONS
from sidfast.accel.prepacked import Prepacked, channels_last, concat_rows
from sidfast.accel.unet_ops import (
    add,
    conv,
    group_norm,
    joint_linear,
    layer_norm,
    linear,
    projections,
    upsample_conv,
)
from sidfast.kernels.geglu import geglu
from sidfast.kernels.upsample import combine_taps


class FusedResnet(Prepacked, ResnetBlock2D):
    """x + conv2(silu(norm2(conv1(silu(norm1(x))) + time embedding))), with a 1x1 shortcut where channels change."""

    def prepack(self) -> tuple[torch.Tensor, ...]:
        """The weights [K, C1 + C2, 3, 3] and [K, K, 3, 3] of the two convolutions, channels last."""
        return channels_last(self.conv1.weight), channels_last(self.conv2.weight)

    def forward(self, x: torch.Tensor, stats: torch.Tensor, temb: torch.Tensor | None = None,
                skip: torch.Tensor | None = None, skip_stats: torch.Tensor | None = None
                ) -> tuple[torch.Tensor, torch.Tensor]:
        """x [N, H, W, C1], skip [N, H, W, C2] (as further channels), each with its statistics, temb [N, D] after SiLU
        or None -> y [N, H, W, K] and its statistics.

        conv1's bias and the time embedding shift whole channels: the second GroupNorm takes them as numbers.
        """
        packed1, packed2 = self.cache or (None, None)
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

    def forward(self, x: torch.Tensor, stats: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [N, H, W, C] and its statistics, text [k N, L, D] -> y [k N, H, W, C] and its statistics."""
        y, x, _ = group_norm(x, stats, self.norm)
        h = linear(y.flatten(1, 2), self.proj_in.weight)
        bias: Any = self.proj_in.bias
        residual: Any = None
        for block in self.transformer_blocks:
            h, bias, residual = block.forward(h, bias, residual, text)       # (without hooks: stage 3's cost time)
        x, out = repeat(x, len(text)), self.proj_out
        return conv(add(h, bias, residual).view_as(x), out.weight, None, out.bias, x)


class FusedTransformerBlock(Prepacked, BasicTransformerBlock):
    """Self-attention, attention to the text, and GEGLU, each after a LayerNorm and added to its input."""

    attend = staticmethod(IMPLEMENTATIONS["math"])       # `fuse` sets the one wanted

    def prepack(self) -> tuple[torch.Tensor, ...]:
        """The projections of self-attention as one [3C, C], those of the text to keys and values as one [2C, D]."""
        return concat_rows(self._own_weights()), concat_rows(self._text_weights())

    def _own_weights(self):
        return [m.weight for m in (self.attn1.to_q, self.attn1.to_k, self.attn1.to_v)]

    def _text_weights(self):
        return [self.attn2.to_k.weight, self.attn2.to_v.weight]

    def forward(self, x: torch.Tensor, bias_of_x: torch.Tensor | None, residual: torch.Tensor | None, text: torch.Tensor
                ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One layer on tokens x + bias_of_x + residual [N, S, C] and text [k N, L, D]. Returns its output as three such
        summands, [k N, S, C], [C] and [k N, S, C]: whatever comes next adds them up in passing."""
        own, of_text = self.cache or (None, None)
        h, y = layer_norm(x, self.norm1, bias_of_x, residual)
        a = self._attention(self.attn1, *projections(y, own, *self._own_weights()))
        h, y = layer_norm(a, self.norm2, self.attn1.to_out[0].bias, h)
        h, q = (repeat(v, len(text)) for v in (h, linear(y, self.attn2.to_q.weight)))
        a = self._attention(self.attn2, q, *projections(text, of_text, *self._text_weights()))
        h, y = layer_norm(a, self.norm3, self.attn2.to_out[0].bias, h)
        up, down = self.ff.net[0].proj, self.ff.net[2]
        y = geglu(linear(y, up.weight, up.bias.detach()), up.bias)
        return linear(y, down.weight), down.bias, h

    def _attention(self, attn, q, k, v):
        o = self.attend(*(t.unflatten(-1, (attn.heads, -1)) for t in (q, k, v)))
        return linear(o.flatten(2), attn.to_out[0].weight)


class FusedDownsample(Prepacked, Downsample2D):
    """A 3x3 convolution in steps of two."""

    def prepack(self) -> tuple[torch.Tensor, ...]:
        """The weight [K, C, 3, 3] channels last."""
        return (channels_last(self.conv.weight),)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [N, H, W, C] -> y [N, H/2, W/2, K], sizes rounded up, and its statistics."""
        return conv(x, self.conv.weight, (self.cache or (None,))[0], self.conv.bias, stride=2)


class FusedUpsample(Prepacked, Upsample2D):
    """Nearest-neighbour upsampling and a 3x3 convolution: twice the size in one 2x2 convolution."""

    def prepack(self) -> tuple[torch.Tensor, ...]:
        """The 2x2 kernel [4K, C, 2, 2] of `combine_taps`."""
        return (combine_taps(self.conv.weight),)

    def forward(self, x: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """x [N, H, W, C] -> y [N, height, width, K] and its statistics."""
        weight, bias = self.conv.weight, self.conv.bias
        if (height, width) == (2 * x.shape[1], 2 * x.shape[2]):
            return upsample_conv(x, weight, (self.cache or (None,))[0], bias)
        x = F.interpolate(x.permute(0, 3, 1, 2), size=(height, width), mode="nearest").permute(0, 2, 3, 1)
        return conv(x.contiguous(), weight, None, bias)


class FusedConvIn(Prepacked, nn.Conv2d):
    """The first convolution: from here on channels are last."""

    def prepack(self) -> tuple[torch.Tensor, ...]:
        """The weight [K, C, 3, 3] channels last."""
        return (channels_last(self.weight),)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [N, C, H, W] -> y [N, H, W, K] and its statistics."""
        return conv(x.permute(0, 2, 3, 1).contiguous(), self.weight, (self.cache or (None,))[0], self.bias)


class FusedNormOut(nn.GroupNorm):
    """The last GroupNorm, with SiLU."""

    def forward(self, x: torch.Tensor, stats: torch.Tensor) -> torch.Tensor:
        """GroupNorm and SiLU: x [N, H, W, C] -> the same as [N, C, H, W] in memory format channels_last."""
        return group_norm(x, stats, self, silu=True)[0].permute(0, 3, 1, 2)


def repeat(x: torch.Tensor, rows: int) -> torch.Tensor:
    """x [N, ...] as often as makes it [rows, ...]."""
    return x if len(x) == rows else x.repeat(rows // len(x), *[1] * (x.ndim - 1))


BLOCKS = (FusedResnet, FusedTransformer, FusedDownsample, FusedUpsample)
"""The modules that read the parameters of the modules inside them: ZeRO stage 3 must gather all of those at once, as
it does if they are one (joined.py)."""
