"""Stable Diffusion XL."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sidfast.common.errors import UserError
from sidfast.method.conditions import Conditions, dtype_of
from sidfast.teachers import clip
from sidfast.teachers.base import Teacher
from sidfast.teachers.compatibility import Kind, check_teacher, given_parts
from sidfast.teachers.sd import CLIP_L, TEXT_LENGTH, VOCABULARY, StableDiffusion

_KIND = Kind("a Stable Diffusion XL pipeline is needed",
             {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"},
             {"addition_embed_type": (("text_time",), "does not take sizes and a pooled text beside the text")})
_OPEN_CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
                "hidden_act": "gelu", "projection_dim": 1280}
_BLOCKS = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
           "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "use_linear_projection": True}
_XL = _BLOCKS | {"block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20),
                 "transformer_layers_per_block": (1, 2, 10), "addition_time_embed_dim": 256}
_VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
_TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_TINY_UNET = _BLOCKS | {"block_out_channels": (16, 16, 32), "attention_head_dim": (2, 2, 4), "layers_per_block": 1,
                        "transformer_layers_per_block": (1, 1, 2), "addition_time_embed_dim": 8, "norm_num_groups": 8}
_TINY_VAE = {"block_out_channels": (8,) * 4, "layers_per_block": 1, "norm_num_groups": 4}


class StableDiffusionXL(StableDiffusion):
    """Two CLIP text encoders, whose last but one layers stand side by side; the UNet also takes the second encoder's
    embedding of the whole text, and the sizes of the image (arXiv 2307.01952)."""

    name = "Stable Diffusion XL"
    networks: ClassVar = StableDiffusion.networks | {"text_encoder_2": "transformers.CLIPTextModelWithProjection"}
    tokenizers: ClassVar = {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"}
    architectures: ClassVar = {                          # name -> (UNet, VAE, text encoders, latent side)
        "sdxl": (_XL, _VAE, (CLIP_L, _OPEN_CLIP_G), 128),
        "sdxl-tiny": (_TINY_UNET, _TINY_VAE, (_TINY, _TINY | {"projection_dim": 8}), 8)}

    def accepts(self, index: dict[str, Any]) -> bool:
        """As Family's: a UNet, and two text encoders."""
        return {"unet", "text_encoder_2"} <= given_parts(index)

    def check(self, folder: Path, what: str) -> dict[str, Any]:
        """As Family's."""
        configs = check_teacher(folder, what, _KIND)
        unet, text = configs["unet"], configs["text_encoder_2"]
        size = text.projection_dim + 6 * (unet.get("addition_time_embed_dim") or 0)
        if unet.get("projection_class_embeddings_input_dim") != size:
            raise UserError(f"{what}: {folder}/unet takes a pooled text and sizes of "
                            f"{unet.get('projection_class_embeddings_input_dim')} values "
                            f"(projection_class_embeddings_input_dim), its text_encoder_2 and addition_time_embed_dim "
                            f"give {size}: they are of different models")
        return configs

    def predict(self, network: nn.Module, x: torch.Tensor, t: torch.Tensor, cond: Conditions) -> torch.Tensor:
        """As Family's."""
        added = {name: cond[name] for name in ("text_embeds", "time_ids")}
        return network(x.to(dtype_of(cond)), t, cond["encoder_hidden_states"], added_cond_kwargs=added,
                       return_dict=False)[0]

    def tokenize(self, teacher: Teacher, prompts: Sequence[str]) -> torch.Tensor:
        """As Family's: [N, 2, L], of both tokenizers."""
        return torch.stack([clip.tokenize(teacher.parts[name], prompts) for name in self.tokenizers], 1)

    def encode(self, teacher: Teacher, ids: torch.Tensor, size: tuple[int, int]) -> Conditions:
        """As Family's: states [N, L, D], text_embeds [N, P]; time_ids [N, 6]: the original's size, the crop's corner,
        the image's size, in pixels, of an image that was neither scaled nor cropped."""
        first, second = (encoder(each, output_hidden_states=True) for encoder, each in zip(
            teacher.text_encoders, ids.unbind(1), strict=True))
        states = torch.cat((first.hidden_states[-2], second.hidden_states[-2]), -1)
        sizes = states.new_tensor([*size, 0, 0, *size])
        return {"encoder_hidden_states": states, "text_embeds": second.text_embeds,
                "time_ids": sizes.expand(len(ids), 6).contiguous()}

    def encode_empty(self, teacher: Teacher, size: tuple[int, int]) -> Conditions:
        """As Family's: zeros in the place of texts, unless the pipeline says otherwise."""
        cond = super().encode_empty(teacher, size)
        if teacher.index.get("force_zeros_for_empty_prompt", True):
            cond |= {name: torch.zeros_like(cond[name]) for name in ("encoder_hidden_states", "text_embeds")}
        return cond

    def conditions(self, teacher: Teacher, n: int, device: torch.device | str | None = None,
                   dtype: torch.dtype | None = None) -> Conditions:
        """As Family's."""
        width = teacher.parts["text_encoder_2"].config.projection_dim
        return super().conditions(teacher, n, device, dtype) | {
            name: torch.zeros(n, size, device=device, dtype=dtype)
            for name, size in (("text_embeds", width), ("time_ids", 6))}

    def capturable(self, teacher: Teacher) -> bool:
        """As Family's."""
        return True

    def pipeline_of(self, parts: dict[str, Any], index: dict[str, Any] | None = None) -> Any:
        """As Family's."""
        flags = {key: value for key, value in (index or {}).items() if key == "force_zeros_for_empty_prompt"}
        return diffusers.StableDiffusionXLPipeline(**parts, **flags, add_watermarker=False)

    def build(self, architecture: str, **tokens: int) -> dict[str, nn.Module]:
        """As Family's."""
        unet, vae, texts, side = self.architectures[architecture]
        first, second = (CLIPTextConfig(vocab_size=VOCABULARY, max_position_embeddings=TEXT_LENGTH, **tokens, **text)
                         for text in texts)
        pooled = second.projection_dim + 6 * unet["addition_time_embed_dim"]
        return {
            "unet": UNet2DConditionModel(
                sample_size=side, cross_attention_dim=first.hidden_size + second.hidden_size,
                addition_embed_type="text_time", projection_class_embeddings_input_dim=pooled, **unet),
            "vae": AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                sample_size=8 * side, scaling_factor=0.13025, force_upcast=True, **vae),
            "text_encoder": CLIPTextModel(first), "text_encoder_2": CLIPTextModelWithProjection(second)}

    def build_scheduler(self, architecture: str, changes: dict[str, Any]) -> Any:
        """As Family's: Stable Diffusion's, of epsilon."""
        return super().build_scheduler("sd15", changes)
