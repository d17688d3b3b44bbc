"""Whether the parts of a teacher fit each other, and make images from text and nothing else: from JSON files alone.

Whatever of a configuration changes latents, texts or images is applied here as StableDiffusionPipeline of diffusers
applies it, or is refused with a line that says why.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sidfast.common.errors import UserError
from sidfast.teachers.untrusted import read_config, read_index, refuse_harm

_CLIPS = ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel")
_UNUSED = {"safety_checker", "feature_extractor", "image_encoder"}               # text-to-image runs without them


@dataclass(frozen=True)
class Kind:
    """What a family of latent diffusion with CLIP's texts is made of.

    `needed`: ends messages; `encoders`: {text encoder: its class}; `unet`: rules for a UNet besides those of all.
    """

    needed: str
    encoders: dict[str, str]
    unet: dict[str, tuple] = field(default_factory=dict)

    @property
    def parts(self) -> tuple[str, ...]:
        """The folders that are needed."""
        tokenizers = (name.replace("text_encoder", "tokenizer") for name in self.encoders)
        return "unet", "vae", *self.encoders, *tokenizers, "scheduler"


# What a UNet must not have: {key: (the values that are fine, what others mean)}.
_UNET = {
    "time_cond_proj_dim": ((None,), "takes the guidance scale as an input: it is a latent consistency model, which is "
                           "a distilled student and not a teacher"),
    "class_embed_type": ((None,), "needs an embedding of an image or a class with every text (unCLIP, for example)"),
    "num_class_embeds": ((None,), "needs a class or a noise level with every text (an upscaler, for example)"),
    "addition_embed_type": ((None,), "needs more than the text"),
    "encoder_hid_dim_type": ((None,), "projects its conditions (an IP-Adapter or Kandinsky, which take an image)"),
    "encoder_hid_dim": ((None,), "projects its conditions (an IP-Adapter or Kandinsky, which take an image)"),
    "attention_type": (("default",), "has layers for boxes in the image (GLIGEN)"),
    "time_embedding_type": (("positional",), "has random features of the timestep, which training would change"),
    "dropout": ((0,), "has dropout, which its own images are drawn without")}
# The same of a VAE.
_VAE = {
    "in_channels": ((3,), "does not take images in RGB"),
    "out_channels": ((3,), "does not give images in RGB"),
    "shift_factor": ((None, 0), "shifts its latents, which Stable Diffusion pipelines do not undo"),
    "latents_mean": ((None,), "normalises its latents, which Stable Diffusion pipelines do not undo"),
    "latents_std": ((None,), "normalises its latents, which Stable Diffusion pipelines do not undo")}


def check_teacher(folder: Path, what: str, kind: "Kind") -> dict[str, Any]:
    """{part: configuration} of a folder: JSON objects, and transformers' own of text encoders. Raises UserError, which
    `what` opens, for parts that do not fit, and for anything but a text-to-image model of this Kind."""
    index = read_index(folder, what)
    _check_parts(folder, index, what, kind)
    configs = {part: read_config(folder / part / "config.json", what) for part in ("unet", "vae", *kind.encoders)}
    scheduler, needed = read_config(folder / "scheduler" / "scheduler_config.json", what), kind.needed
    for part, config in configs.items():
        refuse_harm(config, what, folder / part / "config.json")
    unet, vae = configs["unet"], configs["vae"]
    for part, config, cls in (("unet", unet, "UNet2DConditionModel"), ("vae", vae, "AutoencoderKL")):
        if config.get("_class_name", cls) != cls:
            raise UserError(f"{what}: {folder}/{part} is a {config['_class_name']}, not a {cls}; {needed}")
    for part, config, wrong in (("unet", unet, _UNET | kind.unet), ("vae", vae, _VAE)):
        for key, (fine, meaning) in wrong.items():
            if config.get(key, fine[0]) not in fine:
                raise UserError(f"{what}: {folder}/{part} {meaning}: {key} is {str(config[key])[:60]} in config.json; "
                                f"{needed}")
    texts = {part: _read_text_config(folder / part, configs[part], index[part], what, kind) for part in kind.encoders}
    _check_sizes(folder, unet, vae, texts, what, needed)
    return configs | texts | {"scheduler": scheduler}


def given_parts(index: dict[str, Any]) -> set[str]:
    """The components that a model_index.json names."""
    return {part for part, value in index.items() if isinstance(value, list) and value[:1] != [None]}


def _check_parts(folder, index, what, kind):
    given = given_parts(index)
    for part in kind.parts:
        if part not in given:
            raise UserError(f"{what}: {folder}/model_index.json has no {part}; {kind.needed}")
        if not (folder / part).is_dir():
            raise UserError(f"{what}: {folder} has no folder {part}")
    for part in sorted(given - {*kind.parts, *_UNUSED, "_class_name"}):
        raise UserError(f"{what}: {folder} has a {part} (model_index.json), so its images follow from more than a "
                        f"text; {kind.needed}")


def _read_text_config(folder, config, cls, what, kind):
    """transformers' configuration of a CLIP's text encoder, of a whole CLIP's its text half."""
    from transformers import CLIPTextConfig

    model, wanted = config.get("model_type", "clip_text_model"), kind.encoders[folder.name]
    if model not in ("clip_text_model", "clip"):
        raise UserError(f"{what}: {folder} is a {str(model)[:60]}, not a CLIP; {kind.needed}")
    if cls != ["transformers", wanted] and cls in [["transformers", name] for name in _CLIPS]:
        raise UserError(f"{what}: {folder.parent}/model_index.json loads the {folder.name} as {cls[1]}, which gives "
                        f"other embeddings than {wanted}; write {wanted} there")
    try:
        return CLIPTextConfig.from_pretrained(folder)
    except Exception as error:                           # the library's own for values that it does not know
        raise UserError(f"{what}: {folder}/config.json cannot be read "
                        f"({(str(error).splitlines() or [type(error).__name__])[0][:200]})") from None


def _check_sizes(folder, unet, vae, texts, what, needed):
    channels, out, latent = unet.get("in_channels", 4), unet.get("out_channels", 4), vae.get("latent_channels", 4)
    if channels != out:
        raise UserError(f"{what}: {folder}/unet takes {channels} channels and gives {out} (a model for inpainting, for "
                        "example); a text-to-image model is needed")
    if latent != channels:
        raise UserError(f"{what}: {folder}/vae has latents of {latent} channels, its unet of {channels}: they are of "
                        "different models")
    width, given = unet.get("cross_attention_dim", 1280), sum(text.hidden_size for text in texts.values())
    if width != given:
        raise UserError(f"{what}: {folder}/unet takes texts of width {width} (cross_attention_dim), its "
                        f"{' and '.join(texts)} give{'s' * (len(texts) == 1)} {given} (hidden_size): they are of "
                        "different models")
    blocks = [unet.get(key) for key in ("down_block_types", "mid_block_type", "up_block_types")]
    if None not in blocks[::2] and "CrossAttn" not in str(blocks):
        raise UserError(f"{what}: {folder}/unet has no cross-attention, so the text does not reach its images; "
                        f"{needed}")
    size, factor = unet.get("sample_size"), vae.get("scaling_factor", 0.18215)
    sides = size if isinstance(size, list) and len(size) == 2 else [size]
    if not all(type(side) is int and 1 <= side <= 2048 for side in sides):
        raise UserError(f"{what}: {folder}/unet/config.json: sample_size must be the side of its latents, or [height, "
                        f"width], in whole numbers up to 2048, not {size!r}")
    if not isinstance(factor, (int, float)) or isinstance(factor, bool) or not 0 < factor < 1e9:
        raise UserError(f"{what}: {folder}/vae/config.json: scaling_factor must be a number above 0, not {factor!r}")


def check_tokenizer(folder: Path, tokenizer: Any, text: Any, what: str) -> None:
    """Raise UserError for a tokenizer of another model than the text encoder with transformers' configuration
    `text`."""
    length, most = tokenizer.model_max_length, text.max_position_embeddings
    if type(length) is not int or not 3 <= length <= most:                       # (a word between two marks)
        is_number = isinstance(length, float) or (type(length) is int and abs(length) < 10**300)
        shown = f"{length:.3g}" if is_number else repr(length)[:20]
        raise UserError(f"{what}: {folder} gives up to {shown} tokens, its text encoder takes {most}: its files are "
                        "not all there, or another model's")
    vocabulary = tokenizer.get_vocab()
    words = set(vocabulary.values()) - set(tokenizer.all_special_ids)
    if not words or max(vocabulary.values()) >= text.vocab_size:
        raise UserError(f"{what}: {folder} knows {len(tokenizer)} tokens, its text encoder "
                        f"{text.vocab_size}: its files are not all there, or another model's")
    several = [token for token in tokenizer.added_tokens_encoder if f"{token}_1" in vocabulary]
    if several:
        raise UserError(f"{what}: {folder} has a token of several vectors ({several[0]}, textual inversion), "
                        "which only pipelines of diffusers spell out; give a model without it")


def as_diffusers_sizes(unet: Any) -> Any:
    """Give an old UNet the sample_size that StableDiffusionPipeline gives it: configurations written before diffusers
    0.9 say less than 64 where 64 is meant."""
    written = re.match(r"0\.(\d+)", str(unet.config.get("_diffusers_version")))
    size = unet.config.sample_size
    if written and int(written[1]) < 9 and isinstance(size, int) and size < 64:
        unet.register_to_config(sample_size=64)
    return unet
