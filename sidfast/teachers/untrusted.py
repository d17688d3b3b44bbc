"""Folders of models that someone else made: nothing in them is unpickled, and none of their code is run.

Weights are read from safetensors alone, classes are those of diffusers and transformers. What a folder brings besides
is refused with a line that says what to do about it, before anything is built from it.
"""

import codecs
import json
import math
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from sidfast.common.errors import UserError, first_reason
from sidfast.teachers.weights import STEMS, count_values, read_shapes

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
_LIBRARIES = ("diffusers", "transformers")
_REFUSED = {"auto_map": "code of its own", "custom_pipelines": "code of its own",
            "quantization_config": "another library's code for quantised weights",
            "transformers_weights": "weights under another name"}
_ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation")
_MOST_BYTES, _MOST_LAYERS = 2**20, 4096                  # of a configuration; in a network


def refuse_pickles(folder: Path, what: str, loader: str, load_from: str | Path | None = None) -> None:
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


def refuse_code(folder: Path, what: str) -> None:
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


def read_index(folder: Path, what: str) -> dict[str, Any]:
    """model_index.json of a pipeline folder as a dictionary. Raises UserError if it is none, or names a part that is
    not a folder right inside."""
    path = Path(folder) / "model_index.json"
    index = read_config(path, what)
    for part, value in index.items():
        if isinstance(value, list) and not part.isidentifier():
            raise UserError(f"{what}: {path} names a part {part[:60]!r}, which is not the name of a folder in it")
    return index


def check_parts(folder: Path, what: str, parts: Iterable[str]) -> None:
    """Raise UserError for a pipeline folder with one of `parts` whose configuration is no JSON object (libraries would
    look for another one on the hub), or asks for code."""
    for path in sorted(folder / part / name for part in parts for name in ("config.json", "scheduler_config.json")):
        if path.exists():
            refuse_harm(read_config(path, what), what, path)


def read_config(path: Path, what: str) -> dict[str, Any]:
    """A configuration of someone else's, a JSON object, as a dictionary. Raises UserError, which `what` opens."""
    try:
        if path.exists() and not path.is_file():         # (to read a pipe would wait for ever)
            raise UserError(f"{what}: {path} is not a file")
        if path.stat().st_size > _MOST_BYTES:
            raise UserError(f"{what}: {path} is larger than any configuration ({path.stat().st_size} bytes)")
        data = path.read_bytes()
        if data.startswith(codecs.BOM_UTF8):             # (diffusers and transformers read the file again)
            raise UserError(f"{what}: {path} begins with a byte order mark, which diffusers and transformers do not "
                            "read; save it as UTF-8 without one")
        value = json.loads(data)
    except FileNotFoundError:
        raise UserError(f"{what}: {path} is missing; a folder that diffusers or transformers wrote has one") from None
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{what}: {path} is not valid JSON") from None
    if not isinstance(value, dict):
        raise UserError(f"{what}: {path} must be a JSON object")
    return value


def refuse_harm(config: Any, what: str, path: Path) -> None:
    """Raise UserError for a network's configuration (a dictionary from `path`) that asks for code, or for more layers
    than can be built."""
    layers: dict[str, Any] = {}
    for key, value in _entries(config):
        if value and key in _REFUSED:
            raise UserError(f"{what}: {path} asks for {_REFUSED[key]} ({key}), which is refused; plain weights for the "
                            "classes of diffusers and transformers are needed")
        if key in _ATTENTION and "/" in str(value):
            raise UserError(f"{what}: {path} asks for attention from the hub ({key} {str(value)[:60]!r}), which is "
                            "code that is not run; remove the key")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{what}: {path}: {key} must be a finite number, not {value}")
        if "layers" in key and type(value) is int:
            layers[key] = max(layers.get(key, 1), value)
        elif key == "block_out_channels" and isinstance(value, (list, tuple)):
            layers[key] = max(layers.get(key, 1), len(value))
    for key in layers:
        factors = [key, "block_out_channels", "transformer_layers_per_block"] if "per_block" in key else [key]
        if math.prod(layers.get(name, 1) for name in {*factors}) > _MOST_LAYERS:
            raise UserError(f"{what}: {path} asks for {layers[key]:.4g} layers ({key}), far more than any network has")


def build_on_meta(folder: Path, cls: Any, what: str, variant: str | None = None, weights: bool = True) -> Any:
    """A network of diffusers or transformers without weights, on the meta device, from a folder's config.json.

    Nothing is allocated; the sizes are compared with the headers of the folder's weights of a variant if `weights`.
    Raises UserError, which `what` opens, for a configuration that is broken, asks for code, or does not fit the
    weights.
    """
    path = Path(folder) / "config.json"
    refuse_harm(read_config(path, what), what, path)
    library = library_of(cls)
    try:
        shapes = read_shapes(Path(folder), STEMS[library], variant) if weights else None
        with torch.device("meta"):
            if library == "diffusers":
                network = cls.from_config(cls.load_config(folder))
            else:
                network = cls(cls.config_class.from_pretrained(folder, **attention_of(cls)))
    except Exception as error:                           # each library has exceptions of its own for a broken folder
        raise UserError(f"{what}: {folder} cannot be loaded ({first_reason(error)})") from None
    if shapes is not None:
        _compare(network, shapes, what, path)
    return network


def library_of(cls: Any) -> str:
    """"diffusers" or "transformers", by whose functions a class of network is loaded."""
    return "diffusers" if hasattr(cls, "load_config") else "transformers"


def attention_of(cls: Any) -> dict[str, str]:
    """The option that fixes the attention of a transformers class, for a config.json may name a kernel of the hub."""
    return {"attn_implementation": "sdpa" if getattr(cls, "_supports_sdpa", False) else "eager"}


def _compare(network, shapes, what, path):
    adapters = [name for name in shapes if ".lora_" in name or ".base_layer." in name]
    if adapters:
        raise UserError(f"{what}: {path.parent} has an adapter that was not merged into the weights ({adapters[0]}): "
                        "load the model in diffusers, call fuse_lora() and unload_lora_weights(), and save it again")
    for name, parameter in network.named_parameters():
        if tuple(shapes.get(name, parameter.shape)) != tuple(parameter.shape):
            raise UserError(f"{what}: {path} describes another network than the weights next to it hold: {name} is "
                            f"{list(parameter.shape)} by it, and {list(shapes[name])} there")
    wanted, found = sum(p.numel() for p in network.parameters()), count_values(shapes)
    if wanted > 2 * found:                               # (fewer that are missing are named when the weights are read)
        raise UserError(f"{what}: {path} describes a network of {wanted:,} parameters, the weights next to it hold "
                        f"{found:,}")
    for name, parameter in network.named_parameters():
        if name in shapes and tuple(parameter.shape) != tuple(shapes[name]):
            raise UserError(f"{what}: {path} does not fit the weights next to it: {name} is {[*parameter.shape]} by it "
                            f"and {[*shapes[name]]} there")


def _entries(value, key=""):
    """(key, value) of all values in nested objects and lists; those in a list have the list's key."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield name, item
            yield from _entries(item, name)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield key, item
            yield from _entries(item, key)


def _is_known(library):
    """Whether a library of model_index.json is one of ours, or a module of diffusers' own pipelines."""
    if library in _LIBRARIES:
        return True
    is_name = isinstance(library, str) and library.isidentifier()
    return is_name and find_spec(f"diffusers.pipelines.{library}") is not None


def _short(value):
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
