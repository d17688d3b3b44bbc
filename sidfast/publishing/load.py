"""Loading any folder that can make images: an export, a run directory, or a pipeline of diffusers."""

import math
from pathlib import Path

import torch
from torch import nn

from sidfast.errors import UserError
from sidfast.networks.loading import load_network, load_teacher
from sidfast.networks.schedulers import check_steps
from sidfast.networks.teacher_files import check_hub_id, download, first_reason
from sidfast.networks.untrusted import check_parts, read_index, refuse_code, refuse_pickles
from sidfast.publishing.export import is_one_step, one_step_pipeline


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
    folder that asks for more, or holds no pipeline.
    """
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()                       # of the parts that are read; a second's work
    folder, what = find_pipeline(model, option), f"{option} {model}"
    if is_one_step(folder):                             # its code is ours: nothing of the folder's is run
        parts = load_teacher(str(folder), what)
        t_init = read_index(folder, what).get("t_init")
        if type(t_init) is not int or not 0 < t_init < len(parts.schedule):
            raise UserError(f"{what}: t_init in model_index.json must be a timestep, 1 to {len(parts.schedule) - 1}")
        return one_step_pipeline(parts, parts.unet, t_init).to(device, dtype), True
    if folder.is_dir():
        refuse_code(folder, what)
        check_parts(folder, what)
        for part in sorted(p for p in folder.iterdir() if p.is_dir()):
            refuse_pickles(part, what, "diffusers.DiffusionPipeline", folder)
    networks = _networks(folder, what, dtype)
    try:
        pipe = DiffusionPipeline.from_pretrained(str(folder), torch_dtype=dtype, use_safetensors=True,
                                                 low_cpu_mem_usage=False, trust_remote_code=False, **networks)
    except Exception as error:                           # the libraries raise many kinds for a broken folder
        raise UserError(f"{what}: cannot be loaded ({first_reason(error)})") from None
    return pipe.to(device), False


def _networks(folder, what, dtype):
    """{part: network} of those parts of a pipeline that are diffusers' or transformers' networks, checked."""
    import diffusers
    import transformers

    found, libraries = {}, {"diffusers": diffusers, "transformers": transformers}
    for part, value in read_index(folder, what).items():
        library = libraries.get(value[0]) if isinstance(value, list) and len(value) == 2 else None
        cls = getattr(library, str(value[1]), None) if library else None
        if isinstance(cls, type) and issubclass(cls, nn.Module) and (folder / part).is_dir():
            options = {"torch_dtype": dtype} if library is diffusers else {"dtype": dtype}
            found[part] = load_network(folder / part, cls, what, **options)
    return found


def sampler_options(model, pipe, one_step, steps, guidance):
    """What to call a loaded pipeline with. Raises UserError for a one-step generator that is given either number, and
    for numbers that make no sense."""
    if one_step and (steps is not None or guidance is not None):
        raise UserError(f"--model {model}: a one-step generator takes neither --steps nor --guidance")
    if one_step:
        return {}
    most = pipe.scheduler.config.get("num_train_timesteps")
    if steps is not None and (steps < 1 or (most and steps > most)):
        raise UserError(f"--steps ({steps}) must be at least 1" + (f" and at most {most}" if most else ""))
    if guidance is not None and not math.isfinite(guidance):
        raise UserError(f"--guidance ({guidance}) must be a finite number")
    check_steps(pipe.scheduler, steps or 50, f"--model {model}")
    return {"num_inference_steps": steps or 50, "guidance_scale": 1.5 if guidance is None else guidance}
