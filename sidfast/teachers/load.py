"""From a Stable Diffusion pipeline in the diffusers layout to the parts that distillation needs."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from sidfast.common.errors import UserError
from sidfast.common.sizes import Sized, as_diffusers_sizes
from sidfast.teachers.compatibility import check_teacher, check_tokenizer
from sidfast.teachers.folders import find_teacher, first_reason
from sidfast.teachers.paths import DiscreteBetas
from sidfast.teachers.schedulers import load_schedulers
from sidfast.teachers.untrusted import attention_of, build_on_meta, library_of, refuse_pickles
from sidfast.teachers.weights import choose_variant, find_variants

_SOME = 16                                               # values of a weight that tell it from another
_KEY = "model.teacher"                                   # opens messages about a teacher
_NETWORKS = ("unet", "vae", "text_encoder")
_BUFFER = re.compile(r"position_ids$")                   # which older releases of transformers saved
_REST_OF_CLIP = re.compile(r"(vision_model|visual_projection|text_projection)\.|logit_scale$")
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.")


@dataclass
class Teacher(Sized):
    """A frozen Stable Diffusion: its modules in fp32 on the CPU, as loaded."""

    folder: Path
    unet: nn.Module
    vae: nn.Module
    text_encoder: nn.Module
    tokenizer: object
    scheduler: object
    ddim: object
    schedule: DiscreteBetas

    def fingerprint(self):
        """A hash that tells this teacher from others: of its kind of prediction, its noise levels, and some values of
        each of its weights."""
        levels = [f"{level:.4f}" for level in self.schedule.log_sigma(torch.arange(len(self.schedule))).tolist()]
        digest = hashlib.sha256(f"{self.schedule.prediction_type} {levels}".encode())
        for module in (self.unet, self.vae, self.text_encoder):
            for name, tensor in module.state_dict().items():
                digest.update(f"{name} {tuple(tensor.shape)} {tensor.flatten()[:_SOME].tolist()}".encode())
        return digest.hexdigest()

    def sampler(self):
        """A new DDIM scheduler for images in several steps, on Stable Diffusion's timesteps."""
        return type(self.ddim).from_config(self.ddim.config)


def load_teacher(name, what=_KEY, *, variant=None, revision=None, prediction_type=None):
    """Load a teacher by folder or hub id; safetensors only.

    `variant`, `revision`, `prediction_type`: as in the configuration's section `model`. Raises UserError, which `what`
    opens, for parts that are missing or broken, do not fit each other, or make images from more than a text; before any
    weights are read where the JSON files show it.
    """
    folder = find_teacher(name, variant, revision, what)
    configs = check_teacher(folder, what)
    scheduler, ddim = load_schedulers(folder, configs.scheduler, what, prediction_type)
    for part in _NETWORKS:
        refuse_pickles(folder / part, what, "diffusers.StableDiffusionPipeline", folder)
    if variant is not None and not any(variant in find_variants(folder / part) for part in _NETWORKS):
        raise UserError(f"model.variant: {folder} has no weights of the variant {variant!r}")
    tokenizer = load_tokenizer(folder, configs.text_encoder, what)
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    unet, vae, text_encoder = (load_network(folder / part, cls, what, variant=variant) for part, cls in zip(
        _NETWORKS, (UNet2DConditionModel, AutoencoderKL, CLIPTextModel), strict=True))
    for module in (unet, vae, text_encoder):
        module.float().eval().requires_grad_(False)
    return Teacher(folder, as_diffusers_sizes(unet), vae, text_encoder, tokenizer, scheduler, ddim,
                   DiscreteBetas(scheduler.alphas_cumprod, scheduler.config.prediction_type))


def load_tokenizer(folder, text, what):
    """The tokenizer of a teacher's folder, which fits the text encoder of transformers' configuration `text`. Raises
    UserError, which `what` opens."""
    from transformers import AutoTokenizer

    tokenizer = _load(folder / "tokenizer", AutoTokenizer, what, trust_remote_code=False)
    check_tokenizer(folder / "tokenizer", tokenizer, text, what)
    return tokenizer


def load_network(folder, cls, what, variant=None, **options):
    """A network of diffusers or transformers from a folder's safetensors, every weight of which is there and finite.

    `variant`: of the weights, such as "fp16" (`choose_variant`); `options`: of `from_pretrained`. Raises UserError,
    which `what` opens, for a folder that is broken, asks for code, or has other weights than its config.json describes.
    """
    folder = Path(folder)
    variant = choose_variant(folder, what, variant)
    build_on_meta(folder, cls, what, variant)
    if variant is not None:
        options["variant"] = variant
    options |= {"low_cpu_mem_usage": False} if library_of(cls) == "diffusers" else attention_of(cls)
    # (low_cpu_mem_usage needs another library)
    network, found = _load(folder, cls, what, use_safetensors=True, output_loading_info=True, **options)
    for verb, keys in {"lacks": found["missing_keys"], "has, but its config.json does not know,": [
            key for key in found["unexpected_keys"] if not _is_left_out(key, network)]}.items():
        if keys:
            raise UserError(f"{what}: {folder} {verb} {len(keys)} of the network's tensors ({min(keys)})")
    check_finite_weights(network, f"{what}: {folder}")
    return network


def check_finite_weights(network, what):
    """Raise UserError, which `what` opens, for a network with a weight that is not finite."""
    for name, value in network.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"{what}: {name} has values that are not finite")


def _is_left_out(key, network):
    """Whether a network is complete without a tensor of its file: a buffer, the rest of a CLIP whose text encoder it
    is, or a layer beyond the last one that its configuration asks for (clip skip), as diffusers has it."""
    if _BUFFER.search(key):
        return True
    if type(network).__name__ != "CLIPTextModel":
        return False
    layer = _LAYER.search(key)
    return bool(_REST_OF_CLIP.match(key)) or bool(layer and int(layer[1]) >= network.config.num_hidden_layers)


def _load(folder, cls, what, **options):
    try:
        return cls.from_pretrained(str(folder), **options)
    except Exception as error:                           # each library has exceptions of its own for a broken folder
        raise UserError(f"{what}: {folder} cannot be loaded ({first_reason(error)})") from None
