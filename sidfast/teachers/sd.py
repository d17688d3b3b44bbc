"""Stable Diffusion 1.x and 2.x."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from sidfast.common.errors import UserError, first_reason
from sidfast.method.conditions import Conditions, dtype_of
from sidfast.method.schedule import Schedule
from sidfast.teachers import clip
from sidfast.teachers.base import Family, Teacher
from sidfast.teachers.compatibility import Kind, as_diffusers_sizes, check_teacher, given_parts
from sidfast.teachers.paths import DiscreteBetas
from sidfast.teachers.schedulers import check_changes, load_schedulers
from sidfast.teachers.sd_pipeline import OneStepPipeline
from sidfast.teachers.untrusted import read_index

VOCABULARY, TEXT_LENGTH = 49408, 77                      # CLIP's

CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_OPEN_CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
                "hidden_act": "gelu", "projection_dim": 512}
_SD1 = {"cross_attention_dim": 768, "attention_head_dim": 8}
_SD2 = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}


_KIND = Kind("a Stable Diffusion 1.x or 2.x pipeline is needed", {"text_encoder": "CLIPTextModel"})


class StableDiffusion(Family):
    """One CLIP text encoder, a UNet with cross-attention, a VAE, a table of betas."""

    name, network = "Stable Diffusion 1.x and 2.x", "unet"
    networks: ClassVar = {"unet": "diffusers.UNet2DConditionModel", "vae": "diffusers.AutoencoderKL",
                          "text_encoder": "transformers.CLIPTextModel"}
    tokenizers: ClassVar = {"tokenizer": "text_encoder"}
    architectures: ClassVar = {                            # name -> (UNet, text encoder, latent side, prediction type)
        "sd15": (_SD1, CLIP_L, 64, "epsilon"),
        "sd21": (_SD2, _OPEN_CLIP_H, 64, "epsilon"),
        "sd21-768": (_SD2, _OPEN_CLIP_H, 96, "v_prediction")}

    def accepts(self, index: dict[str, Any]) -> bool:
        """As Family's: a UNet, and one text encoder."""
        return "unet" in index and "text_encoder_2" not in given_parts(index)

    def check(self, folder: Path, what: str) -> dict[str, Any]:
        """As Family's."""
        return check_teacher(folder, what, _KIND)

    def schedulers(self, folder: Path, configs: dict[str, Any], what: str, changes: dict[str, Any]) -> tuple[Any, Any]:
        """As Family's: DDPM's levels for exports, DDIM for images in several steps."""
        return load_schedulers(folder, configs["scheduler"], what, changes)

    def schedule(self, scheduler: Any) -> Schedule:
        """As Family's."""
        return DiscreteBetas(scheduler.alphas_cumprod, scheduler.config.prediction_type)

    def adapt(self, network: nn.Module) -> nn.Module:
        """As Family's."""
        return as_diffusers_sizes(network)

    def predict(self, network: nn.Module, x: torch.Tensor, t: torch.Tensor, cond: Conditions) -> torch.Tensor:
        """As Family's."""
        return network(x.to(dtype_of(cond)), t, **cond, return_dict=False)[0]

    def tokenize(self, teacher: Teacher, prompts: Sequence[str]) -> torch.Tensor:
        """As Family's: [N, L], or [N, 2, L] with a mask."""
        return clip.tokenize_for(teacher.parts["text_encoder"], teacher.parts["tokenizer"], prompts)

    def encode(self, teacher: Teacher, ids: torch.Tensor, size: tuple[int, int]) -> Conditions:
        """As Family's."""
        return {"encoder_hidden_states": clip.states(teacher.parts["text_encoder"], ids)}

    def conditions(self, teacher: Teacher, n: int, device: torch.device | str | None = None,
                   dtype: torch.dtype | None = None) -> Conditions:
        """As Family's: texts [n, L, D]."""
        tokenizer, text = teacher.parts.get("tokenizer"), teacher.parts["text_encoder"].config
        length = tokenizer.model_max_length if tokenizer else text.max_position_embeddings
        shape: Any = n, length, teacher.network.config.cross_attention_dim
        return {"encoder_hidden_states": torch.zeros(shape, device=device, dtype=dtype)}

    def capturable(self, teacher: Teacher) -> bool:
        """As Family's: not with a mask, which transformers reads on the host."""
        return not clip.takes_mask(teacher.parts["text_encoder"])

    def prompt_limit(self, teacher: Teacher) -> tuple[Any, int] | None:
        """As Family's."""
        most = clip.most_tokens(teacher.parts["tokenizer"], teacher.parts["text_encoder"].config)
        return None if most is None else (teacher.parts["tokenizer"], most)

    def pipeline(self, teacher: Teacher) -> Any:
        """As Family's."""
        folder: Any = teacher.folder                     # (with weights there are files)
        what = f"model.teacher: {folder}"
        name = str(read_index(folder, what)["scheduler"][-1])
        cls = getattr(diffusers, name, None)
        if not (isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)):
            raise UserError(f"{what}: scheduler {name[:60]} (model_index.json) is not one of diffusers")
        try:
            scheduler = cls.from_pretrained(folder / "scheduler", **teacher.changes)         # type: ignore[attr-defined]
        except Exception as error:                       # the library raises many kinds for a broken folder
            raise UserError(f"{what}: its {name} cannot be loaded ({first_reason(error)})") from None
        return self.pipeline_of(teacher.parts | {"scheduler": scheduler}, teacher.index)

    def pipeline_of(self, parts: dict[str, Any], index: dict[str, Any] | None = None) -> Any:
        """As Family's."""
        return diffusers.StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None,
                                                 requires_safety_checker=False)

    def one_step_pipeline(self, teacher: Teacher, network: nn.Module, t_init: int) -> Any:
        """As Family's."""
        return OneStepPipeline(**teacher.parts | {"unet": network}, t_init=t_init)

    def build(self, architecture: str, **tokens: int) -> dict[str, nn.Module]:
        """As Family's."""
        unet, text, side, _ = self.architectures[architecture]
        return {
            "unet": UNet2DConditionModel(sample_size=side, **unet),
            "vae": AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=8 * side),
            "text_encoder": CLIPTextModel(CLIPTextConfig(
                vocab_size=VOCABULARY, max_position_embeddings=TEXT_LENGTH, **tokens, **text))}

    def build_scheduler(self, architecture: str, changes: dict[str, Any]) -> Any:
        """As Family's."""
        scheduler = stable_diffusion_scheduler(StableDiffusion.architectures[architecture][-1])
        check_changes(DDIMScheduler, changes)
        return DDIMScheduler.from_config(scheduler.config, **changes)


def stable_diffusion_scheduler(prediction_type: str) -> DDIMScheduler:
    """The noise levels of Stable Diffusion (method.md, section 1) with a DDIM sampler."""
    return DDIMScheduler(num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                         clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type)
