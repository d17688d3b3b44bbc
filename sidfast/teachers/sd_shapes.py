"""The embedded teacher's networks: a small Stable Diffusion, and a small CLIP, in the library's own classes."""

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPVisionConfig

from sidfast.data.shapes import IMAGE_SIZE
from sidfast.teachers.sd import stable_diffusion_scheduler

WIDTH = 128                                              # of the text encoder, and of CLIP's embedding


def build_vae(latent_channels: int) -> nn.Module:
    """64 x 64 images to 8 x 8 latents; narrow where the image is large."""
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=latent_channels, sample_size=IMAGE_SIZE, scaling_factor=1.0,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 48, 80, 96), layers_per_block=1, norm_num_groups=8, mid_block_add_attention=False)


def build_unet(latent_channels: int) -> nn.Module:
    """A UNet of two levels (8 x 8 and 4 x 4), both with cross-attention: 5.4 M parameters."""
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 8, in_channels=latent_channels, out_channels=latent_channels,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(96, 128), layers_per_block=1, cross_attention_dim=WIDTH, attention_head_dim=4,
        norm_num_groups=32)


def build_clip(tokenizer: Any) -> nn.Module:
    """A CLIP whose text tower is also the first state of the text encoder."""
    text = {"vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 2,
                "num_attention_heads": 4, "max_position_embeddings": tokenizer.model_max_length,
                "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id, "projection_dim": WIDTH}
    vision = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 3, "num_attention_heads": 4,
                  "image_size": IMAGE_SIZE, "patch_size": 8, "projection_dim": WIDTH}
    return CLIPModel(CLIPConfig(text_config=CLIPTextConfig(**text), vision_config=CLIPVisionConfig(**vision),
                                projection_dim=WIDTH))


def build_text_encoder(clip: Any) -> nn.Module:
    """A text encoder that starts from CLIP's text tower."""
    encoder = CLIPTextModel(clip.config.text_config)
    encoder.load_state_dict(clip.text_model.state_dict())
    return encoder


def noise_levels() -> tuple[torch.Tensor, torch.Tensor]:
    """(a, s) of every timestep, [T] each (method.md, eq. 1)."""
    a2 = stable_diffusion_scheduler("epsilon").alphas_cumprod
    return a2.sqrt(), (1 - a2).sqrt()
