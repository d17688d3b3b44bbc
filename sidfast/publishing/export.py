"""Writing a finished generator as a diffusers pipeline folder."""

import contextlib
import copy
import ctypes
import errno
import json
import os
import shutil
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from tokenizers.models import BPE
from torch import nn

from sidfast.common.errors import UserError
from sidfast.common.files import drop_lock, flush, remove, take_lock
from sidfast.common.records import Distillation, load
from sidfast.publishing import pipeline as pipeline_module
from sidfast.publishing.pipeline import OneStepPipeline
from sidfast.teachers.untrusted import read_index

_CODE = "pipeline.py"
_OLD_PREFIX = "text_model."                              # of a text encoder's weights in transformers 4
_DISTILLATION = "distillation.json"
_CONTENTS = {"vae", "text_encoder", "unet", "tokenizer", "scheduler", "model_index.json", _CODE, _DISTILLATION,
             "README.md", "grid.png"}
_HERE, _RENAME_EXCHANGE = -100, 2                        # AT_FDCWD; linux/fs.h


def one_step_pipeline(teacher, unet, t_init):
    """The one-step pipeline of a UNet with a teacher's other parts."""
    return OneStepPipeline(vae=teacher.vae, text_encoder=teacher.text_encoder, tokenizer=teacher.tokenizer, unet=unet,
                           scheduler=teacher.scheduler, t_init=t_init)


def student_unet(teacher, weights, resolution=None):
    """A UNet like a teacher's, as diffusers has it, that takes over other weights ({name: fp32 tensor}).

    `resolution`: of its images, as `model.resolution`. Raises RuntimeError for weights of another network.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(teacher.unet.config)
    unet.requires_grad_(False).eval().load_state_dict(weights, assign=True)
    if resolution:
        height, width = teacher.latent_shape(resolution)[1:]
        unet.register_to_config(sample_size=height if height == width else [height, width])
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
            remove(partial)
            raise
        replace_folder(partial, folder)


def holds_export(folder):
    """Whether a folder is an export of ours, and holds nothing that would be lost with it."""
    return is_one_step(Path(folder)) and {path.name for path in Path(folder).iterdir()} <= _CONTENTS


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
    if old.is_dir() and not old.is_symlink() and not folder.exists():
        old.rename(folder)
    for left in (_partial(folder), old):
        remove(left)


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
    remove(old)
    if not folder.exists():
        new.rename(folder)
    elif _exchange(new, folder):
        new.rename(old)
    else:
        folder.rename(old)                               # between these two, `recover_export` knows the way back
        new.rename(folder)
    flush(folder.parent)
    remove(old)


def _exchange(a, b):
    """Exchange two names by Linux's renameat2; False where that is not possible."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    return call(_HERE, os.fsencode(a), _HERE, os.fsencode(b), _RENAME_EXCHANGE) == 0


def read_distillation(folder):
    """What an export says of the run that it comes from: {"teacher", "guidance": {"kappa1", ...}, "seed", "step",
    "settings"}, the last a hash of all other settings; {} where it says nothing. Raises UserError for a file that is
    damaged."""
    path = Path(folder) / _DISTILLATION
    if not path.exists():
        return {}
    return load(path, Distillation, f"{path}: is damaged", "write the export again, or remove this file")


def half_type(*modules):
    """float16, or bfloat16 if a weight of the modules is beyond float16's range (65504)."""
    most = torch.finfo(torch.float16).max
    fits = all(p.abs().max() <= most for module in modules for p in module.parameters() if p.numel())
    return torch.float16 if fits else torch.bfloat16


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


def is_one_step(folder):
    """Whether model_index.json of a folder names the one-step pipeline."""
    try:
        index = read_index(folder, "")
    except UserError:                                    # what comes next says so
        return False
    return index.get("_class_name") == [_CODE.removesuffix(".py"), OneStepPipeline.__name__]
