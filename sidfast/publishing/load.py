"""Loading any folder that can make images: an export, a run directory, or a text-to-image pipeline of diffusers.

A pipeline is loaded for the images that its networks make. What diffusers would do to them afterwards (a safety
checker that blackens some, a watermark) and what only other tasks need (an image encoder) is left out and named by
`loading_notes`.
"""

import importlib
import math
from pathlib import Path

import torch
from torch import nn

from sidfast.common.errors import UserError, first_reason
from sidfast.publishing.export import is_one_step, read_start
from sidfast.publishing.pipeline_class import check_unet, text_to_image_class
from sidfast.teachers.compatibility import check_tokenizer
from sidfast.teachers.folders import check_hub_id, download
from sidfast.teachers.load import load_network, load_teacher
from sidfast.teachers.schedulers import check_steps
from sidfast.teachers.untrusted import check_parts, library_of, read_index, refuse_code, refuse_pickles

_LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder", "watermarker")
_MOST_GUIDANCE = 1000


def find_pipeline(model, option="--model"):
    """The folder of a diffusers pipeline, given as a run directory, itself, or a hub id (downloaded unless cached).

    Raises UserError, which names `option`, for a folder that holds none, and for what is neither.
    """
    folder, what = Path(model), f"{option} {model}"
    if (folder / "config.json").is_file() and not (folder / "model_index.json").is_file():
        if (folder / "metrics.jsonl").is_file() and not (folder / "export").is_dir():
            raise UserError(f"{what}: the run has no export yet; one is written with every checkpoint")
        folder = folder / "export" if (folder / "export").is_dir() else folder
    if not folder.is_dir():
        return _download(str(model), what)
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{what}: neither a run directory nor a diffusers pipeline (model_index.json is missing)")
    return folder


def _download(model, what):
    """A pipeline's folder in the hub's cache, named after the commit; safetensors only, and no code."""
    check_hub_id(model, what)
    try:
        return download(model)
    except Exception as error:                           # the hub library raises its own, the network's and the OS's
        raise UserError(f"{what}: no folder here, and the hub did not give it ({first_reason(error)})") from None


def load_pipeline(model, device, dtype=torch.float32, option="--model"):
    """A pipeline from a run directory, an export, or any other diffusers folder or hub id, ready on `device`.

    Returns (pipe, one_step). Code that the folder brings is not run, and no pickle is read: a one-step pipeline is this
    package's own class, everything else diffusers' and transformers'. Raises UserError, which names `option`, for a
    folder that asks for more, that holds no pipeline, or whose pipeline needs more than a prompt.
    """
    from diffusers.utils import logging

    logging.disable_progress_bar()                       # of the parts that are read; a second's work
    folder, what = find_pipeline(model, option), f"{option} {model}"
    if is_one_step(folder):                              # its code is ours: nothing of the folder's is run
        teacher = load_teacher(str(folder), what)
        t_init = read_start(folder)
        if type(t_init) is not int or not 0 < t_init < len(teacher.schedule):
            raise UserError(f"{what}: t_init in its JSON files must be a timestep, 1 to {len(teacher.schedule) - 1}")
        return teacher.one_step_pipeline(teacher.network, t_init).to(device, dtype), True
    index = read_index(folder, what)
    refuse_code(folder, what)
    cls = text_to_image_class(index["_class_name"], folder, what)
    given = _constructor_options(cls)
    parts = _parts(index, cls, given)
    _check_folders(folder, parts, what)
    check_unet(folder, cls, what)
    try:
        pipe = cls.from_pretrained(str(folder), torch_dtype=dtype, use_safetensors=True, low_cpu_mem_usage=False,
                                   trust_remote_code=False, load_connected_pipeline=False, **given,
                                   **_networks(folder, parts, what, dtype))
    except UserError:
        raise
    except Exception as error:                           # the libraries raise many kinds for a broken folder
        raise UserError(f"{what}: cannot be loaded ({first_reason(error)})") from None
    _check_tokenizers(folder, pipe, what)
    return pipe.to(device), False


def loading_notes(model, option="--model"):
    """What was changed about a folder's pipeline as `load_pipeline` loaded it, {} where nothing was.

    "left_out": names of its components that are not used; "saved_as": the class that it names, where another one, for
    text to image, was used.
    """
    folder, what = find_pipeline(model, option), f"{option} {model}"
    if is_one_step(folder):
        return {}
    index = read_index(folder, what)
    cls = text_to_image_class(index["_class_name"], folder, what)
    used = _parts(index, cls, _constructor_options(cls))
    left_out = sorted(name for name, value in index.items() if name not in used and _is_component(value))
    notes = {"left_out": left_out} if left_out else {}
    return notes | ({"saved_as": index["_class_name"]} if cls.__name__ != index["_class_name"] else {})


def _constructor_options(cls):
    """What a pipeline class is called with, so that its images are those of its networks."""
    expected, options = cls._get_signature_keys(cls)
    given = {name: None for name in _LEFT_OUT if name in cls._optional_components and name in expected}
    return given | {name: False for name in ("requires_safety_checker", "add_watermarker") if name in options}


def _parts(index, cls, given):
    """{name: [library, class]} of the components in model_index.json that the pipeline is made of."""
    expected, _ = cls._get_signature_keys(cls)
    return {name: value for name, value in index.items() if name in expected and name not in given
            and _is_component(value)}


def _is_component(value):
    return isinstance(value, list) and len(value) == 2 and value[0] is not None


def _check_folders(folder, parts, what):
    for name in parts:
        if not (folder / name).is_dir():
            raise UserError(f"{what}: {folder} has no folder {name}, which its model_index.json names")
        refuse_pickles(folder / name, what, "diffusers.DiffusionPipeline", folder)
    check_parts(folder, what, parts)


def _networks(folder, parts, what, dtype):
    """{name: network} of those components that are networks of diffusers or transformers, checked."""
    found = {}
    for name, (library, kind) in parts.items():
        source = library if library in ("diffusers", "transformers") else f"diffusers.pipelines.{library}"
        cls = getattr(importlib.import_module(source), str(kind), None)
        if isinstance(cls, type) and issubclass(cls, nn.Module):
            options = {"dtype" if library_of(cls) == "transformers" else "torch_dtype": dtype}
            found[name] = load_network(folder / name, cls, what, **options)
    return found


def _check_tokenizers(folder, pipe, what):
    """Check each tokenizer against its CLIP text encoder: tokenizer with text_encoder, tokenizer_2 with text_encoder_2.
    (Other kinds of encoder have no largest length.)"""
    for name, tokenizer in pipe.components.items():
        encoder = getattr(pipe, name.replace("tokenizer", "text_encoder"), None)
        if name.startswith("tokenizer") and getattr(getattr(encoder, "config", None), "model_type", "") in (
                "clip", "clip_text_model"):
            check_tokenizer(folder / name, tokenizer, encoder.config, what)


def sampler_options(model, pipe, one_step, steps, guidance):
    """What to call a loaded pipeline with. Raises UserError for a one-step generator that is given either number, and
    for numbers that make no sense."""
    if one_step and (steps is not None or guidance is not None):
        raise UserError(f"--model {model}: a one-step generator takes neither --steps nor --guidance")
    if one_step:
        return {}
    most = pipe.scheduler.config.get("num_train_timesteps") or 1000
    if steps is not None and not 1 <= steps <= most:
        raise UserError(f"--steps ({steps}) must be at least 1 and at most {most}")
    if guidance is not None and not (math.isfinite(guidance) and 0 <= guidance <= _MOST_GUIDANCE):
        raise UserError(f"--guidance ({guidance}) must be a number from 0 to {_MOST_GUIDANCE}")
    try:
        check_steps(pipe.scheduler, steps or 50, f"--model {model}")
    except (ValueError, TypeError, RuntimeError) as error:           # of the scheduler itself
        raise UserError(f"--steps {steps or 50}: {type(pipe.scheduler).__name__} of {model} does not take them "
                        f"({first_reason(error)})") from None
    return {"num_inference_steps": steps or 50, "guidance_scale": 1.5 if guidance is None else guidance}
