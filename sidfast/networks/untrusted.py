"""Folders of models that someone else made: nothing in them is unpickled, and none of their code is run.

Weights are read from safetensors alone, classes are those of diffusers and transformers. What a folder brings besides
is refused with a line that says what to do about it.
"""

import json
from importlib.util import find_spec

from sidfast.errors import UserError

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
_LIBRARIES = ("diffusers", "transformers")


def refuse_pickles(folder, what, loader, load_from=None):
    """Raise UserError for a folder whose weights exist as pickles only.

    `what` opens the message; `loader` is the class that reads `load_from` (default: `folder`) and writes safetensors.
    """
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
    if pickles:
        raise UserError(
            f"{what}: {folder} has its weights as a pickle only ({pickles[0]}), which can run code when it is "
            f"loaded; safetensors are needed. If you trust it, convert it once in Python: "
            f"{loader}.from_pretrained({str(load_from or folder)!r}, use_safetensors=False).save_pretrained(NEW)")


def refuse_code(folder, what):
    """Raise UserError for a pipeline folder whose model_index.json, or a part of it, asks for code of its own."""
    index = read_index(folder, what)
    name = index.get("_class_name")
    if not isinstance(name, str):
        raise UserError(f"{what}: {folder} is a pipeline with code of its own ({_short(name)} in model_index.json), "
                        "which is not run; exports of sidfast and the pipelines of diffusers are")
    for part, value in index.items():
        if isinstance(value, list) and len(value) == 2 and value[0] is not None and not _is_known(value[0]):
            raise UserError(f"{what}: the {part} of {folder} comes from {_short(value[0])} (model_index.json), not "
                            f"from {' or '.join(_LIBRARIES)}; code of a model's own is not run")


def read_index(folder, what):
    """model_index.json of a pipeline folder as a dictionary. Raises UserError if it is none."""
    return _read_object(folder / "model_index.json", what)


def check_parts(folder, what):
    """Raise UserError for a pipeline folder with a part whose configuration is no JSON object. (Libraries would look
    for another one on the hub.)"""
    for path in sorted((*folder.glob("*/config.json"), *folder.glob("*/scheduler_config.json"))):
        _read_object(path, what)


def _read_object(path, what):
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{what}: {path} is missing or not valid JSON") from None
    if not isinstance(value, dict):
        raise UserError(f"{what}: {path} must be a JSON object")
    return value


def _is_known(library):
    """Whether a library of model_index.json is one of ours, or a module of diffusers' own pipelines."""
    if library in _LIBRARIES:
        return True
    is_name = isinstance(library, str) and library.isidentifier()
    return is_name and find_spec(f"diffusers.pipelines.{library}") is not None


def _short(value):
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
