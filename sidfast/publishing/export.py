"""Writing a finished generator as a diffusers pipeline folder, and loading any folder that can make images."""

import copy
import json
import shutil
from pathlib import Path

import torch
from torch import nn

from sidfast.errors import UserError
from sidfast.networks.loading import load_teacher
from sidfast.publishing import pipeline as pipeline_module
from sidfast.publishing.pipeline import OneStepPipeline

_CODE = "pipeline.py"


def one_step_pipeline(teacher, unet, t_init):
    """The one-step pipeline of a UNet with a teacher's other parts."""
    return OneStepPipeline(vae=teacher.vae, text_encoder=teacher.text_encoder, tokenizer=teacher.tokenizer, unet=unet,
                           scheduler=teacher.scheduler, t_init=t_init)


def write_export(pipe, folder, dtype=torch.float16):
    """Write a one-step pipeline to `folder` in safetensors, replacing an earlier export only once it is complete.

    The folder holds the pipeline's code, so diffusers loads it with trust_remote_code and without this package.
    """
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in ("vae", "text_encoder", "unet"):
        save_module(getattr(pipe, name), partial / name, dtype)
    pipe.tokenizer.save_pretrained(partial / "tokenizer")
    pipe.scheduler.save_pretrained(partial / "scheduler")
    index = {"_class_name": [_CODE.removesuffix(".py"), OneStepPipeline.__name__], "t_init": pipe.config.t_init}
    for name in ("vae", "unet", "scheduler"):
        index[name] = ["diffusers", type(getattr(pipe, name)).__name__]
    for name in ("text_encoder", "tokenizer"):
        index[name] = ["transformers", type(getattr(pipe, name)).__name__]
    (partial / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    shutil.copy(pipeline_module.__file__, partial / _CODE)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def save_module(module, folder, dtype=torch.float16):
    """Write a diffusers or transformers module in `dtype`, in a way that loads in the type that the caller asks for."""
    module = nn.Module.to(copy.deepcopy(module), "cpu", dtype)                  # (diffusers' own `to` warns of fp16)
    module.save_pretrained(folder)
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    if "dtype" in config:                                # transformers loads in this type, or else as stored, unasked
        config["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n")


def find_pipeline(model):
    """The folder of a diffusers pipeline, given as a run directory or as itself; a hub id is returned as it is.

    Raises UserError for a folder that holds none.
    """
    folder = Path(model)
    if (folder / "config.json").is_file() and not (folder / "model_index.json").is_file():
        folder = folder / "export"
        if not folder.is_dir():
            raise UserError(f"{model}: the run has no export yet; one is written with every checkpoint")
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise UserError(f"{model}: neither a run directory nor a diffusers pipeline (model_index.json is missing)")
    return folder


def load_pipeline(model, device, dtype=torch.float32):
    """A pipeline from a run directory, an export, or any other diffusers folder or hub id, ready on `device`.

    Returns (pipe, one_step). Raises UserError for a folder that holds none.
    """
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()                       # of the parts that are read; a second's work
    folder = find_pipeline(model)
    if _is_one_step(folder):                             # its code is ours: nothing of the folder's is run
        parts = load_teacher(str(folder))
        t_init = json.loads((folder / "model_index.json").read_text())["t_init"]
        return one_step_pipeline(parts, parts.unet, t_init).to(device, dtype), True
    try:
        pipe = DiffusionPipeline.from_pretrained(str(folder) if folder.is_dir() else model, torch_dtype=dtype,
                                                 use_safetensors=True, low_cpu_mem_usage=False)
    except Exception as error:                           # the libraries raise many kinds for a broken folder
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{model}: cannot be loaded ({lines[0]})") from None
    return pipe.to(device), False


def sampler_options(model, one_step, steps, guidance):
    """What to call a loaded pipeline with. Raises UserError for a one-step generator that is given either number."""
    if not one_step:
        return {"num_inference_steps": steps or 50, "guidance_scale": 1.5 if guidance is None else guidance}
    if steps is not None or guidance is not None:
        raise UserError(f"{model}: a one-step generator takes neither --steps nor --guidance")
    return {}


def _is_one_step(folder):
    try:
        index = json.loads((folder / "model_index.json").read_text())
    except (OSError, ValueError):
        return False
    return index.get("_class_name") == [_CODE.removesuffix(".py"), OneStepPipeline.__name__]
