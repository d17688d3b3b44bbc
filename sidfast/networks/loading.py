"""From a Stable Diffusion pipeline in the diffusers layout to the parts that distillation needs."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from sidfast.errors import UserError
from sidfast.method.denoise import PREDICTION_TYPES
from sidfast.method.noise import NoiseSchedule
from sidfast.networks.untrusted import refuse_pickles

_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class Teacher:
    """A frozen Stable Diffusion: its modules in fp32 on the CPU, as loaded."""

    folder: Path
    unet: nn.Module
    vae: nn.Module
    text_encoder: nn.Module
    tokenizer: object
    scheduler: object
    schedule: NoiseSchedule
    prediction_type: str

    @property
    def latent_factor(self):
        """Pixels along the side of a latent one."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def resolution(self):
        """The side of its images in pixels."""
        return self.unet.config.sample_size * self.latent_factor

    def sampler(self):
        """A new DDIM scheduler for images in several steps, on Stable Diffusion's timesteps."""
        from diffusers import DDIMScheduler

        return DDIMScheduler.from_config(self.scheduler.config, set_alpha_to_one=False, steps_offset=1)


def find_teacher(name):
    """The folder of a teacher given as a folder or as a hub id (downloaded unless cached). Raises UserError."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    if not _HUB_ID.fullmatch(name):
        raise UserError(f"model.teacher: {name} is neither a folder nor a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        wanted = [f"{part}/*{end}" for part in _PARTS for end in (".json", ".txt", ".safetensors", ".model")]
        return Path(snapshot_download(name, allow_patterns=["model_index.json", *wanted],
                                      ignore_patterns=["*.fp16.*", "*non_ema*"]))
    except Exception as error:                           # the hub library raises its own, the network's and the OS's
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"model.teacher: {name} is no folder here, and the hub did not give it ({reason})") from None


def check_teacher(folder):
    """Check a teacher's folder by its JSON files alone. Raises UserError for what cannot be distilled."""
    index = _read_json(folder, "model_index.json")
    for part in _PARTS:
        if part not in index:
            raise UserError(f"model.teacher: {folder}/model_index.json has no {part}; "
                            "a Stable Diffusion 1.x or 2.x pipeline is needed")
        if not (folder / part).is_dir():
            raise UserError(f"model.teacher: {folder} has no folder {part}")
    if "text_encoder_2" in index:
        raise UserError(f"model.teacher: {folder} has two text encoders; Stable Diffusion 1.x and 2.x have one")
    unet = _read_json(folder, "unet/config.json")
    if unet.get("_class_name") != "UNet2DConditionModel":
        raise UserError(f"model.teacher: {folder}/unet is no UNet2DConditionModel")
    if unet.get("in_channels", 4) != unet.get("out_channels", 4):
        raise UserError(f"model.teacher: {folder}/unet takes {unet['in_channels']} channels and gives "
                        f"{unet['out_channels']} (a model for inpainting, say); a text-to-image model is needed")
    scheduler = _read_json(folder, "scheduler/scheduler_config.json")
    kind = scheduler.get("_class_name", "")
    if "beta_schedule" not in scheduler:
        raise UserError(f"model.teacher: scheduler {kind} is not supported; one with a beta schedule is needed "
                        "(DDIM, DDPM, PNDM, Euler, DPM-Solver)")
    if scheduler.get("prediction_type", "epsilon") not in PREDICTION_TYPES:
        raise UserError(f"model.teacher: prediction type {scheduler['prediction_type']!r} of the scheduler is not "
                        f"supported; {' and '.join(PREDICTION_TYPES)} are")


def load_teacher(name):
    """Load a teacher by folder or hub id; safetensors only. Raises UserError for anything missing or broken."""
    folder = find_teacher(name)
    check_teacher(folder)
    for part in ("unet", "vae", "text_encoder"):
        refuse_pickles(folder / part, "model.teacher", "diffusers.StableDiffusionPipeline", folder)
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import AutoTokenizer, CLIPTextModel

    unet = _load(folder, "unet", UNet2DConditionModel, use_safetensors=True, low_cpu_mem_usage=False)
    vae = _load(folder, "vae", AutoencoderKL, use_safetensors=True, low_cpu_mem_usage=False)
    text_encoder = _load(folder, "text_encoder", CLIPTextModel, use_safetensors=True)
    tokenizer = _load(folder, "tokenizer", AutoTokenizer, trust_remote_code=False)
    scheduler = _load(folder, "scheduler", DDPMScheduler)
    if "clip_sample" not in _read_json(folder, "scheduler/scheduler_config.json"):
        scheduler = DDPMScheduler.from_config(scheduler.config, clip_sample=False)         # (its default is for pixels)
    for module in (unet, vae, text_encoder):
        module.float().eval().requires_grad_(False)
    return Teacher(folder, unet, vae, text_encoder, tokenizer, scheduler, NoiseSchedule(scheduler.alphas_cumprod),
                   scheduler.config.prediction_type)


def _load(folder, part, cls, **options):
    try:
        return cls.from_pretrained(str(folder / part), **options)
    except Exception as error:                           # each library has exceptions of its own for a broken folder
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"model.teacher: {folder / part} cannot be loaded ({lines[0]})") from None


def _read_json(folder, name):
    path = folder / name
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"model.teacher: {path} is missing; a diffusers pipeline folder has one") from None
    except (OSError, ValueError):
        raise UserError(f"model.teacher: {path} is not valid JSON") from None
