"""A whole pipeline on the fused kernels, for making many images: its UNet and decoder replayed as CUDA graphs.

Launching the kernels of a one-step pass takes longer than running them.
"""

from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from sidfast.accel.attention import choose_attention
from sidfast.accel.decoder import decoder_fuse_blocker, fuse_decoder
from sidfast.accel.graphs import GraphedStep
from sidfast.accel.prepacked import refresh
from sidfast.accel.unet import attention_shapes, fuse, fuse_blocker
from sidfast.common.errors import UserError
from sidfast.common.sizes import pair
from sidfast.kernels.backend import INTERPRETED

_PIXELS = 4 * 512**2                                     # decoded at once: more takes memory and is no faster


class Replayed:
    """`function(*tensors) -> tensor`, without gradients, as a CUDA graph for batches of `rows` in the shapes of the
    first one; for any other batch the function itself."""

    def __init__(self, function, rows):
        self.function, self.rows = function, rows
        self._step = None

    def __call__(self, *tensors):
        """function(*tensors), a tensor of its own. The first batch of `rows` rows is captured."""
        if self._step is None and len(tensors[0]) == self.rows:
            self._step = GraphedStep(self.function, tensors[0].device, tensors, warmup=2)
        if self._step is None or not self._step.fits(tensors):
            return self.function(*tensors)
        return self._step(*tensors).clone()


def fuse_pipeline(pipe: Any, rows: int, name: str) -> None:
    """Make a loaded pipeline run on the fused kernels, for batches that bring `rows` rows to the UNet.

    Raises UserError, naming the model, where there is no GPU or a network that they do not cover.
    """
    reason = _fuse_blocker(pipe)
    if reason:
        raise UserError(f"{name}: cannot run on the fused kernels: {reason}")
    device = pipe.unet.device
    height, width = pair(pipe.unet.config.sample_size)
    options = {"device": device, "dtype": pipe.unet.dtype}
    x = torch.zeros(1, pipe.unet.config.in_channels, height, width, **options)
    text = torch.zeros(1, pipe.tokenizer.model_max_length, pipe.unet.config.cross_attention_dim, **options)
    shapes = attention_shapes(pipe.unet, rows, lambda unet: unet(x, torch.zeros(1, device=device), text))
    fuse(pipe.unet, next(iter(choose_attention(tuple(shapes), pipe.unet.dtype, device))))
    fuse_decoder(pipe.vae)
    refresh(pipe.unet)
    refresh(pipe.vae)
    pixels = height * width * 4 ** (len(pipe.vae.config.block_out_channels) - 1)
    _replay_unet(pipe.unet, rows)
    _replay_decoder(pipe.vae.decoder, max(1, _PIXELS // pixels))


def _fuse_blocker(pipe):
    missing = [part for part in ("unet", "vae", "tokenizer") if getattr(pipe, part, None) is None]
    if missing:
        return f"a pipeline without {', '.join(missing)}"
    if pipe.unet.device.type != "cuda" and not INTERPRETED:
        return "there is no GPU here"
    if pipe.unet.config.addition_embed_type is not None:
        return "a UNet with further conditions (SDXL)"
    return fuse_blocker(pipe.unet) or decoder_fuse_blocker(pipe.vae)


def _replay_unet(unet, rows):
    run = unet.forward
    replayed = Replayed(lambda *inputs: run(*inputs, return_dict=False)[0], rows)

    def forward(sample, timestep, encoder_hidden_states, return_dict=True, **others):
        if torch.is_grad_enabled() or any(value is not None for value in others.values()):
            return run(sample, timestep, encoder_hidden_states, return_dict=return_dict, **others)
        t = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        output = replayed(sample, t, encoder_hidden_states)
        return UNet2DConditionOutput(output) if return_dict else (output,)

    unet.forward = forward


def _replay_decoder(decoder, rows):
    replayed = Replayed(decoder.forward, rows)

    def forward(sample, latent_embeds=None):
        if torch.is_grad_enabled():
            return replayed.function(sample, latent_embeds)
        return torch.cat([replayed(part) for part in sample.split(rows)])

    decoder.forward = forward
