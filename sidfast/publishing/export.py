"""Writing a finished generator as a diffusers pipeline folder."""

import contextlib
import copy
import errno
import inspect
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers.models import BPE
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sidfast.common.errors import UserError
from sidfast.common.files import locked, recover_folder, replacing_folder
from sidfast.common.records import Distillation, load
from sidfast.teachers.untrusted import read_index
from sidfast.teachers.weights import check_exportable

_CODE, _CLASS = "pipeline.py", "OneStepPipeline"         # of every family's exports
_OLD_PREFIX = "text_model."                              # of a text encoder's weights in transformers 4
_DISTILLATION = "distillation.json"
_CONTENTS = {"model_index.json", _CODE, _DISTILLATION, "README.md", "grid.png"}            # besides the parts


def write_export(pipe, folder, dtype=torch.float16, distillation=None):
    """Write a generator's pipeline to `folder` in safetensors, replacing an earlier export only once it is complete.

    The folder of a one-step pipeline holds its code, so diffusers loads it with trust_remote_code and without this
    package; that of a stock pipeline (`plain_pipeline`) needs no code.
    `distillation` (JSON values) says where the generator comes from; see `read_distillation`. Raises OSError where
    nothing can be written, or another process is writing there; UserError for weights that `dtype` cannot hold.
    """
    folder = Path(folder)
    with _writing(folder) as alone:
        if not alone:
            raise BlockingIOError(errno.EWOULDBLOCK, f"another process is writing an export to {folder}")
        with replacing_folder(folder) as new:
            _write(pipe, new, dtype, distillation)


def holds_export(folder):
    """Whether a folder is an export of ours, and holds nothing that would be lost with it."""
    if not is_one_step(folder):
        return False
    return {path.name for path in Path(folder).iterdir()} <= _CONTENTS | read_index(folder, "").keys()


def recover_export(folder):
    """Undo what a process that was killed while it wrote an export left: nothing half-written, and an export if there
    was one."""
    with _writing(Path(folder)) as alone:
        if alone:                                        # (or else nothing was left: it is being written)
            recover_folder(Path(folder))


@contextlib.contextmanager
def _writing(folder):
    """Whether this process alone writes an export to a folder: two at once would mix their files."""
    if not folder.parent.is_dir():
        yield True
        return
    with locked(folder.with_name(f".{folder.name}.lock")) as alone:
        yield alone


def _write(pipe, folder, dtype, distillation):
    ours = "t_init" in pipe.config
    index = {"_class_name": [_CODE.removesuffix(".py"), _CLASS] if ours else type(pipe).__name__}
    index |= {name: value for name, value in pipe.config.items() if name[0] != "_" and name not in pipe.components}
    for name, part in pipe.components.items():
        if part is not None:
            index[name] = [_save_part(part, folder / name, dtype), type(part).__name__]
        elif not ours:                                   # (a stock pipeline has parts that may be left out)
            index[name] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    if ours:
        shutil.copy(inspect.getfile(type(pipe)), folder / _CODE)
    if distillation:
        (folder / _DISTILLATION).write_text(json.dumps(distillation, indent=2) + "\n")


def _save_part(part, folder, dtype):
    """Write a component of a pipeline; returns the library that loads it."""
    if isinstance(part, PreTrainedTokenizerBase):
        save_tokenizer(part, folder)
    elif not isinstance(part, nn.Module):
        part.save_pretrained(folder)
    elif getattr(part.config, "model_type", None) == "clip_text_model":
        save_text_encoder(part, folder, dtype)
    else:
        save_module(part, folder, dtype)
    return "transformers" if isinstance(part, (PreTrainedModel, PreTrainedTokenizerBase)) else "diffusers"


def read_distillation(folder):
    """What an export says of the run that it comes from: {"teacher", "guidance": {"kappa1", ...}, "seed", "step",
    "settings"}, the last a hash of all other settings; {} where it says nothing. Raises UserError for a file that is
    damaged."""
    path = Path(folder) / _DISTILLATION
    if not path.exists():
        return {}
    return load(path, Distillation, f"{path}: is damaged", "write the export again, or remove this file")


def networks_of(pipe):
    """The networks of a pipeline."""
    return [part for part in pipe.components.values() if isinstance(part, nn.Module)]


def half_type(*modules):
    """float16, or bfloat16 if a weight of the modules is beyond float16's range (65504)."""
    most = torch.finfo(torch.float16).max
    fits = all(p.abs().max() <= most for module in modules for p in module.parameters() if p.numel())
    return torch.float16 if fits else torch.bfloat16


def save_module(module, folder, dtype=torch.float16):
    """Write a diffusers or transformers module in `dtype`, in a way that loads in the type that the caller asks for."""
    module = nn.Module.to(copy.deepcopy(module), "cpu", dtype)                  # (diffusers' own `to` warns of fp16)
    check_exportable(module.state_dict(), f"{Path(folder).name}, as {dtype}".replace("torch.", ""))
    module.save_pretrained(folder)
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    if "dtype" in config:                                # transformers loads in this type, or else as stored, unasked
        config["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n")


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


def is_student(folder):
    """Whether a folder is an export of a distilled generator."""
    return (Path(folder) / _DISTILLATION).is_file() or is_one_step(folder)


def is_one_step(folder):
    """Whether a folder is an export: its model_index.json names the one-step pipeline, or its distillation.json says
    that a stock pipeline has such a generator."""
    try:
        index = read_index(folder, "")
    except UserError:                                    # what comes next says so
        return False
    return index.get("_class_name") == [_CODE.removesuffix(".py"), _CLASS] or "plain" in read_distillation(folder)


def read_start(folder):
    """The timestep at which the generator of an export starts, as its files state it, unchecked."""
    plain = read_distillation(folder).get("plain")
    return plain["t_init"] if plain else read_index(folder, "").get("t_init")
