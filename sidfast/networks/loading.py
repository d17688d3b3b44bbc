"""From a Stable Diffusion pipeline in the diffusers layout to the parts that distillation needs."""

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from sidfast.errors import UserError
from sidfast.method.denoise import PREDICTION_TYPES
from sidfast.method.noise import NoiseSchedule
from sidfast.networks.untrusted import refuse_pickles

_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_SOME = 16                                               # values of a weight that tell it from another
_KEY = "model.teacher"                                   # opens messages about a teacher
README = "README.md"                                     # of the hub: what states the licence
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

    def fingerprint(self):
        """A hash that tells this teacher from others: of its kind of prediction, its noise levels, and some values of
        each of its weights."""
        levels = [f"{level:.4f}" for level in self.schedule.log_sigma.tolist()]
        digest = hashlib.sha256(f"{self.prediction_type} {levels}".encode())
        for module in (self.unet, self.vae, self.text_encoder):
            for name, tensor in module.state_dict().items():
                digest.update(f"{name} {tuple(tensor.shape)} {tensor.flatten()[:_SOME].tolist()}".encode())
        return digest.hexdigest()

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
        return Path(snapshot_download(name, allow_patterns=["model_index.json", README, *wanted],
                                      ignore_patterns=["*.fp16.*", "*non_ema*"]))
    except Exception as error:                           # the hub library raises its own, the network's and the OS's
        raise UserError(f"model.teacher: {name} is no folder here, and the hub did not give it "
                        f"({first_reason(error)})") from None


def find_readme(name):
    """The README.md of a teacher's folder, or of a hub id in the cache on this machine; None if it is not there."""
    path = Path(name) / README
    if path.is_file():
        return path
    if Path(name).is_dir() or not _HUB_ID.fullmatch(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, README)
    except ValueError:                                   # no id after all, "../x" say
        return None
    return Path(found) if isinstance(found, str) else None


def check_teacher(folder, what=_KEY):
    """Check a teacher's folder by its JSON files alone. Raises UserError, which `what` opens, for what cannot be
    distilled."""
    index = _read_json(what, folder, "model_index.json")
    for part in _PARTS:
        if part not in index:
            raise UserError(f"{what}: {folder}/model_index.json has no {part}; "
                            "a Stable Diffusion 1.x or 2.x pipeline is needed")
        if not (folder / part).is_dir():
            raise UserError(f"{what}: {folder} has no folder {part}")
    if "text_encoder_2" in index:
        raise UserError(f"{what}: {folder} has two text encoders; Stable Diffusion 1.x and 2.x have one")
    unet, _ = _read_json(what, folder, "unet/config.json"), _read_json(what, folder, "vae/config.json")
    if unet.get("_class_name") != "UNet2DConditionModel":
        raise UserError(f"{what}: {folder}/unet is no UNet2DConditionModel")
    if unet.get("in_channels", 4) != unet.get("out_channels", 4):
        raise UserError(f"{what}: {folder}/unet takes {unet['in_channels']} channels and gives "
                        f"{unet['out_channels']} (a model for inpainting, say); a text-to-image model is needed")
    scheduler = _read_json(what, folder, "scheduler/scheduler_config.json")
    kind = scheduler.get("_class_name", "")
    if "beta_schedule" not in scheduler:
        raise UserError(f"{what}: scheduler {kind} is not supported; one with a beta schedule is needed "
                        "(DDIM, DDPM, PNDM, Euler, DPM-Solver)")
    if scheduler.get("prediction_type", "epsilon") not in PREDICTION_TYPES:
        raise UserError(f"{what}: prediction type {scheduler['prediction_type']!r} of the scheduler is not "
                        f"supported; {' and '.join(PREDICTION_TYPES)} are")


def load_teacher(name, what=_KEY):
    """Load a teacher by folder or hub id; safetensors only. Raises UserError, which `what` opens, for anything missing
    or broken."""
    folder = find_teacher(name)
    check_teacher(folder, what)
    for part in ("unet", "vae", "text_encoder"):
        refuse_pickles(folder / part, what, "diffusers.StableDiffusionPipeline", folder)
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import AutoTokenizer, CLIPTextModel

    unet, vae, text_encoder = (load_network(folder / part, cls, what) for part, cls in (
        ("unet", UNet2DConditionModel), ("vae", AutoencoderKL), ("text_encoder", CLIPTextModel)))
    _check_sizes(what, folder, unet, vae)
    tokenizer = _load(folder / "tokenizer", AutoTokenizer, what, trust_remote_code=False)
    _check_tokenizer(what, folder, tokenizer, text_encoder)
    scheduler = _load(folder / "scheduler", DDPMScheduler, what)
    _check_schedule(what, folder, scheduler)
    if "clip_sample" not in _read_json(what, folder, "scheduler/scheduler_config.json"):
        scheduler = DDPMScheduler.from_config(scheduler.config, clip_sample=False)         # (its default is for pixels)
    for module in (unet, vae, text_encoder):
        module.float().eval().requires_grad_(False)
    return Teacher(folder, unet, vae, text_encoder, tokenizer, scheduler, NoiseSchedule(scheduler.alphas_cumprod),
                   scheduler.config.prediction_type)


def load_network(folder, cls, what, **options):
    """A network of diffusers or transformers from a folder's safetensors, every weight of which is there and finite.

    `what` opens the message of the UserError for a folder where that is not so, or that is broken.
    """
    if not any(Path(folder).glob("*.safetensors")):      # (diffusers would tell of it in lines of its own as well)
        raise UserError(f"{what}: {folder} has no weights (*.safetensors)")
    if cls.__module__.startswith("diffusers"):
        options |= {"low_cpu_mem_usage": False}          # (which needs another library)
    network, found = _load(folder, cls, what, use_safetensors=True, output_loading_info=True, **options)
    wrong = {"lacks": found["missing_keys"], "has, but its config.json does not know,": [
        key for key in found["unexpected_keys"] if not key.endswith("position_ids")]}      # (of older transformers)
    for verb, keys in wrong.items():
        if keys:
            raise UserError(f"{what}: {folder} {verb} {len(keys)} of the network's tensors ({min(keys)})")
    for name, value in network.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"{what}: {folder}: {name} has values that are not finite")
    return network


def _load(folder, cls, what, **options):
    try:
        return cls.from_pretrained(str(folder), **options)
    except Exception as error:                           # each library has exceptions of its own for a broken folder
        raise UserError(f"{what}: {folder} cannot be loaded ({first_reason(error)})") from None


def first_reason(error):
    """The first line of an exception's text that says something: not one that ends in a colon, unless there is no
    other."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if not line.endswith(":")), lines[0])[:300]


def _check_sizes(what, folder, unet, vae):
    size, factor = unet.config.sample_size, vae.config.scaling_factor
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise UserError(f"{what}: {folder}/unet/config.json: sample_size must be one whole number, the side of "
                        f"its square latents, not {size!r}")
    if not isinstance(factor, (int, float)) or isinstance(factor, bool) or not 0 < factor < math.inf:
        raise UserError(f"{what}: {folder}/vae/config.json: scaling_factor must be a number above 0, not "
                        f"{factor!r}")


def _check_tokenizer(what, folder, tokenizer, text_encoder):
    length, most = tokenizer.model_max_length, text_encoder.config.max_position_embeddings
    if not 1 <= length <= most:
        raise UserError(f"{what}: {folder}/tokenizer gives up to {length:.3g} tokens, its text encoder takes "
                        f"{most}: its files are not all there, or another model's")
    words = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)
    if not words or len(tokenizer) > text_encoder.config.vocab_size:
        raise UserError(f"{what}: {folder}/tokenizer knows {len(tokenizer)} tokens, its text encoder "
                        f"{text_encoder.config.vocab_size}: its files are not all there, or another model's")


def _check_schedule(what, folder, scheduler):
    a2 = scheduler.alphas_cumprod
    if len(a2) < 2 or not (a2[-1] >= 0 and a2[0] < 1 and (a2[1:] < a2[:-1]).all()):
        raise UserError(f"{what}: {folder}/scheduler/scheduler_config.json: its levels of noise must rise from "
                        "step to step between none and all; see num_train_timesteps and the betas")


def _read_json(what, folder, name):
    path = folder / name
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{what}: {path} is missing; a diffusers pipeline folder has one") from None
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{what}: {path} is not valid JSON") from None
    if not isinstance(value, dict):
        raise UserError(f"{what}: {path} must be a JSON object")
    return value
