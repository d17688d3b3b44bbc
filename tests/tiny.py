"""A real diffusers pipeline folder, small enough that a training step takes milliseconds."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from sidfast.teachers.tokenizer import build_tokenizer

MIDDLE = {"down_block_types": ("DownBlock2D",), "mid_block_type": "UNetMidBlock2DCrossAttn"}
NO_MIDDLE = {"down_block_types": ("CrossAttnDownBlock2D",), "mid_block_type": None}    # fewer layers


def write_tiny_teacher(folder, prediction_type="epsilon", seed=0, levels=2, side=8, unet_blocks=MIDDLE):
    """Write a randomly initialised Stable Diffusion to `folder`: latents of side x side, twice as large by each level
    of the VAE but the first."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * levels,
                        up_block_types=("UpDecoderBlock2D",) * levels, block_out_channels=(4,) * levels,
                        norm_num_groups=2, sample_size=side * 2 ** (levels - 1), mid_block_add_attention=False)
    unet = UNet2DConditionModel(
        sample_size=side, up_block_types=("UpBlock2D",), block_out_channels=(16,), layers_per_block=1,
        cross_attention_dim=16, attention_head_dim=4, norm_num_groups=4, **unet_blocks)
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type)
    StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False).save_pretrained(folder)
    return folder
