"""Which class of diffusers makes images from text alone with the parts of a pipeline folder."""

import inspect
import json

import diffusers
from diffusers.pipelines import auto_pipeline

from sidfast.common.errors import UserError

_NEEDED = ("prompt", "num_inference_steps", "guidance_scale", "generator", "output_type")
_OF_OTHER_TASKS = ("image", "images", "control_image", "mask_image", "video", "control_video", "num_frames", "frames",
                   "video_length", "audio_length_in_s", "audio_end_in_s", "audio_duration", "class_labels")
_CONDITIONS = ("class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim_type")


def text_to_image_class(name, folder, what):
    """The text-to-image pipeline class for a folder whose model_index.json names the class `name`.

    A class for images from images or for inpainting gives way to the one for text to image with the same parts, as in
    diffusers' AutoPipelineForText2Image. Raises UserError, which `what` opens, where there is none.
    """
    cls = getattr(diffusers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline)):
        raise UserError(f"{what}: {folder} is a {name[:60]} (model_index.json), which is not a pipeline of the "
                        f"diffusers {diffusers.__version__} installed here")
    text = auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING
    if cls not in text.values():
        for other in (auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING):
            cls = next((text[key] for key, value in other.items() if value is cls and key in text), cls)
    takes = inspect.signature(cls.__call__).parameters
    known = cls in text.values() and "Control" not in cls.__name__               # (an image is a choice there)
    lacks = [n for n in _NEEDED if n not in takes]
    asks = [n for n in _OF_OTHER_TASKS if n in takes and not (known and n == "image")]
    asks += [n for n, p in takes.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
             and n not in ("self", *_NEEDED)]
    if lacks or asks:
        reason = f"works with {asks[0]}" if asks else f"takes no {lacks[0]}"
        raise UserError(f"{what}: {folder} is a {cls.__name__} (model_index.json), which {reason}; a text-to-image "
                        "pipeline is needed")
    return cls


def check_unet(folder, cls, what):
    """Raise UserError for a pipeline whose UNet takes more than latents, time and text, which `cls` does not give."""
    unet, vae = (_read(folder / part / "config.json") for part in ("unet", "vae"))
    channels, latents = unet.get("in_channels", 4), vae.get("latent_channels", 4)
    if unet and vae and channels != latents:
        raise UserError(f"{what}: {folder}/unet takes {channels} channels, its latents have {latents}: a model for "
                        "inpainting, or one that needs an image in another way; a text-to-image model is needed")
    if cls is diffusers.StableDiffusionPipeline:
        for key in _CONDITIONS:
            if unet.get(key) not in (None, "text_proj"):
                raise UserError(f"{what}: {folder}/unet/config.json: {key} is {unet[key]!r}: it takes a condition that "
                                f"a {cls.__name__} does not give")


def _read(path):
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
