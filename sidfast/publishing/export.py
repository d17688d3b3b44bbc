"""Writing a finished generator as a diffusers pipeline folder, and loading any folder that can make images."""

import contextlib
import copy
import ctypes
import errno
import json
import math
import os
import re
import shutil
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from tokenizers.models import BPE
from torch import nn

from sidfast.errors import UserError
from sidfast.files import drop_lock, flush, take_lock
from sidfast.networks.loading import README, first_reason, load_network, load_teacher
from sidfast.networks.untrusted import check_parts, read_index, refuse_code, refuse_pickles
from sidfast.publishing import pipeline as pipeline_module
from sidfast.publishing.pipeline import OneStepPipeline

_CODE = "pipeline.py"
_OLD_PREFIX = "text_model."                              # of a text encoder's weights in transformers 4
_DISTILLATION = "distillation.json"
_CONTENTS = {"vae", "text_encoder", "unet", "tokenizer", "scheduler", "model_index.json", _CODE, _DISTILLATION,
             "README.md", "grid.png"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HERE, _RENAME_EXCHANGE = -100, 2                        # AT_FDCWD; linux/fs.h


def one_step_pipeline(teacher, unet, t_init):
    """The one-step pipeline of a UNet with a teacher's other parts."""
    return OneStepPipeline(vae=teacher.vae, text_encoder=teacher.text_encoder, tokenizer=teacher.tokenizer, unet=unet,
                           scheduler=teacher.scheduler, t_init=t_init)


def student_unet(teacher, weights, resolution=None):
    """A UNet like a teacher's, as diffusers has it, that takes over other weights ({name: fp32 tensor}).

    `resolution`: of its images in pixels, unless the teacher's. Raises RuntimeError for weights of another network.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(teacher.unet.config)
    unet.requires_grad_(False).eval().load_state_dict(weights, assign=True)
    if resolution:
        unet.register_to_config(sample_size=resolution * unet.config.sample_size // teacher.resolution)
    return unet


def write_export(pipe, folder, dtype=torch.float16, distillation=None):
    """Write a one-step pipeline to `folder` in safetensors, replacing an earlier export only once it is complete.

    The folder holds the pipeline's code, so diffusers loads it with trust_remote_code and without this package.
    `distillation` (JSON values) says where the generator comes from; see `read_distillation`. Raises OSError where
    nothing can be written, or another process is writing there; UserError for weights that `dtype` cannot hold.
    """
    folder = Path(folder)
    with _writing(folder) as alone:
        if not alone:
            raise BlockingIOError(errno.EWOULDBLOCK, f"another process is writing an export to {folder}")
        _recover(folder)
        partial = _partial(folder)
        try:
            _write(pipe, partial, dtype, distillation)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        replace_folder(partial, folder)


def holds_export(folder):
    """Whether a folder is an export of ours, and holds nothing that would be lost with it."""
    return _is_one_step(Path(folder)) and {path.name for path in Path(folder).iterdir()} <= _CONTENTS


def recover_export(folder):
    """Undo what a process that was killed while it wrote an export left: nothing half-written, and an export if there
    was one."""
    with _writing(Path(folder)) as alone:
        if alone:                                        # (or else nothing was left: it is being written)
            _recover(Path(folder))


@contextlib.contextmanager
def _writing(folder):
    """Whether this process alone writes an export to a folder: two at once would mix their files."""
    if not folder.parent.is_dir():
        yield True
        return
    lock = take_lock(folder.with_name(f".{folder.name}.lock"))
    try:
        yield lock is not None
    finally:
        if lock is not None:
            drop_lock(lock)


def _recover(folder):
    old = _old(folder)
    if old.is_dir() and not folder.exists():
        old.rename(folder)
    for left in (_partial(folder), old):
        shutil.rmtree(left, ignore_errors=True)


def _partial(folder):
    return folder.with_name(f".{folder.name}.partial")


def _old(folder):
    return folder.with_name(f".{folder.name}.old")


def _write(pipe, partial, dtype, distillation):
    partial.mkdir(parents=True)
    for name in ("vae", "unet"):
        save_module(getattr(pipe, name), partial / name, dtype)
    save_text_encoder(pipe.text_encoder, partial / "text_encoder", dtype)
    save_tokenizer(pipe.tokenizer, partial / "tokenizer")
    pipe.scheduler.save_pretrained(partial / "scheduler")
    index = {"_class_name": [_CODE.removesuffix(".py"), OneStepPipeline.__name__], "t_init": pipe.config.t_init}
    for name in ("vae", "unet", "scheduler"):
        index[name] = ["diffusers", type(getattr(pipe, name)).__name__]
    for name in ("text_encoder", "tokenizer"):
        index[name] = ["transformers", type(getattr(pipe, name)).__name__]
    (partial / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    shutil.copy(pipeline_module.__file__, partial / _CODE)
    if distillation:
        (partial / _DISTILLATION).write_text(json.dumps(distillation, indent=2) + "\n")
    for path in sorted(partial.rglob("*")):
        if path.is_file():                               # (safetensors writes files that their owner alone can read)
            shutil.copymode(partial / "model_index.json", path)
        flush(path)


def replace_folder(new, folder):
    """Put a finished folder in another's place, at one moment where the file system can exchange two names."""
    old = _old(folder)
    if not folder.exists():
        new.rename(folder)
    elif _exchange(new, folder):
        new.rename(old)
    else:
        folder.rename(old)                               # between these two, `recover_export` knows the way back
        new.rename(folder)
    flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(a, b):
    """Exchange two names by Linux's renameat2; False where that is not possible."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    return call(_HERE, os.fsencode(a), _HERE, os.fsencode(b), _RENAME_EXCHANGE) == 0


def read_distillation(folder):
    """What an export says of the run that it comes from: {"teacher", "guidance": {"kappa1", ...}, "seed", "step",
    "settings"}, the last a hash of all other settings; {} where it says nothing."""
    try:
        known = json.loads((Path(folder) / _DISTILLATION).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def save_module(module, folder, dtype=torch.float16):
    """Write a diffusers or transformers module in `dtype`, in a way that loads in the type that the caller asks for."""
    module = nn.Module.to(copy.deepcopy(module), "cpu", dtype)                  # (diffusers' own `to` warns of fp16)
    check_finite_weights(module.state_dict(), f"{Path(folder).name}, as {dtype}".replace("torch.", ""))
    module.save_pretrained(folder)
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    if "dtype" in config:                                # transformers loads in this type, or else as stored, unasked
        config["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n")


def check_finite_weights(weights, what):
    """Raise UserError for {name: tensor} with values that are not finite, such as those beyond 65504 in fp16."""
    for name, value in weights.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"export: weights of the {what}, are not finite ({name}); if they are in another type, "
                            "take that: --dtype bf16 or fp32")


def save_text_encoder(module, folder, dtype=torch.float16):
    """Write a CLIP text encoder so that transformers 4 and 5 load it: `save_module` with the names of transformers 4,
    which 5 reads too. (4 does not read those of 5: it would draw all weights at random.)"""
    folder = Path(folder)
    save_module(module, folder, dtype)
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = config["dtype"] = "float32"                          # (its name in transformers 4)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = {_OLD_PREFIX + name.removeprefix(_OLD_PREFIX): value.to("cpu", dtype).contiguous()
               for name, value in module.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def save_tokenizer(tokenizer, folder):
    """Write a CLIP tokenizer with the files of transformers 5 (tokenizer.json) and those of 4 (vocab.json, merges.txt,
    special_tokens_map.json, added_tokens.json)."""
    folder = Path(folder)
    tokenizer = copy.deepcopy(tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:                              # (its last call left these, and files would differ by it)
        backend.no_padding()
        backend.no_truncation()
    tokenizer.save_pretrained(folder)
    if not isinstance(getattr(backend, "model", None), BPE):
        return                                           # not a CLIP tokenizer
    backend.model.save(str(folder))
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    known = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    added = {token: number for token, number in tokenizer.get_vocab().items() if token not in known}
    if added:
        (folder / "added_tokens.json").write_text(json.dumps(added, indent=2) + "\n")


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
    if not _HUB_ID.fullmatch(model):
        raise UserError(f"{what}: neither a folder nor a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    wanted = [f"*/*{end}" for end in (".json", ".txt", ".safetensors", ".model")]
    try:
        return Path(snapshot_download(model, allow_patterns=["model_index.json", README, *wanted],
                                      ignore_patterns=["*.fp16.*", "*non_ema*"]))
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
    if _is_one_step(folder):                             # its code is ours: nothing of the folder's is run
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
    return {"num_inference_steps": steps or 50, "guidance_scale": 1.5 if guidance is None else guidance}


def _is_one_step(folder):
    try:
        index = json.loads((folder / "model_index.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(index, dict) and index.get("_class_name") == [_CODE.removesuffix(".py"), OneStepPipeline.__name__]
