"""Randomly initialised teachers of real architectures: the real path at real size, without any weights to download."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from sidfast.common.errors import UserError
from sidfast.common.files import remove
from sidfast.teachers.tokenizer import build_tokenizer

_VOCABULARY, _TEXT_LENGTH = 49408, 77                    # CLIP's; the tokenizer here knows the shapes world only

_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_OPEN_CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
                    "hidden_act": "gelu", "projection_dim": 512}
_SD1 = {"cross_attention_dim": 768, "attention_head_dim": 8}
_SD2 = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}

ARCHITECTURES = {                                        # name -> (UNet, text encoder, latent side, prediction type)
    "sd15": (_SD1, _CLIP_L, 64, "epsilon"),
    "sd21": (_SD2, _OPEN_CLIP_H, 64, "epsilon"),
    "sd21-768": (_SD2, _OPEN_CLIP_H, 96, "v_prediction"),
}


def build_networks(architecture, **tokens):
    """{"unet", "vae", "text_encoder"} of ARCHITECTURES[architecture], on torch's default device; `tokens`: special ids
    of the text encoder."""
    unet, text, side, _ = ARCHITECTURES[architecture]
    return {
        "unet": UNet2DConditionModel(sample_size=side, **unet),
        "vae": AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=8 * side),
        "text_encoder": CLIPTextModel(CLIPTextConfig(
            vocab_size=_VOCABULARY, max_position_embeddings=_TEXT_LENGTH, **tokens, **text))}


def build_scheduler(prediction_type):
    """Stable Diffusion's DDIMScheduler."""
    return DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
                         set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type)


def write_random_teacher(architecture, folder, device, seed=0):
    """Write a pipeline of ARCHITECTURES[architecture] with random weights, fp16, about 2 GB, to `folder`.

    All or nothing. Raises UserError for a folder that is not empty, or cannot be made.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out {folder}: is there already; choose another folder")
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        remove(partial)
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be made ({error.strerror})") from None
    prediction_type = ARCHITECTURES[architecture][3]
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = _TEXT_LENGTH
    torch.manual_seed(seed)
    with torch.device(device):
        parts = build_networks(architecture, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                               pad_token_id=tokenizer.pad_token_id)
    scheduler = build_scheduler(prediction_type)
    for module in parts.values():
        torch.nn.Module.to(module, "cpu", torch.float16)
    StableDiffusionPipeline(tokenizer=tokenizer, scheduler=scheduler, safety_checker=None, feature_extractor=None,
                            requires_safety_checker=False, **parts).save_pretrained(partial)
    if folder.exists():
        folder.rmdir()
    partial.rename(folder)
