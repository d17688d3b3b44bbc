"""Which safetensors files of a network's folder are loaded, and what their headers say; no weight is read here.

Libraries name them `model.safetensors` (transformers) and `diffusion_pytorch_model.safetensors` (diffusers), with
`.fp16` or another variant before the ending, and list the files of a network that is split in `....index.json`.
"""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from sidfast.common.errors import UserError

STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}        # library -> start of the names
_NAME = re.compile(rf"({'|'.join(STEMS.values())})(?:\.(?P<file>[\w-]+))?\.safetensors|"
                   rf"({'|'.join(STEMS.values())})\.safetensors\.index(?:\.(?P<index>[\w-]+))?\.json")
_SHARD = re.compile(r"\d+-of-\d+$")


def find_variants(folder: Path) -> set[str | None]:
    """The variants in which the weights of a folder exist: a set of names, such as "fp16"; None for plain weights."""
    names = (_NAME.fullmatch(path.name) for path in folder.iterdir()) if folder.is_dir() else ()
    found = {match["file"] or match["index"] for match in names if match}
    return {variant for variant in found if variant is None or not _SHARD.search(variant)}


def choose_variant(folder: Path, what: str, wanted: str | None = None) -> str | None:
    """The variant to load of a folder's weights: `wanted` if it is there, or else plain weights (None), or else the
    only one there is. Raises UserError, which `what` opens, if there are several, or none."""
    found = find_variants(folder)
    if wanted in found or None in found:
        return wanted if wanted in found else None
    if len(found) == 1:
        return found.pop()
    if found:
        names = ", ".join(sorted(map(str, found)))
        raise UserError(f"{what}: {folder} has its weights only as variants ({names}); choose one with model.variant, "
                        "or leave one there")
    raise UserError(f"{what}: {folder} has no weights (*.safetensors)")


def read_shapes(folder: Path, stem: str, variant: str | None = None) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the tensors in a folder's weights, from the headers of the files.

    Raises ValueError for an index that names anything but safetensors files of that folder, and for weights that are
    not floating-point numbers; OSError or SafetensorError
    for files that are missing or damaged.
    """
    path = folder / f"{stem}{f'.{variant}' if variant else ''}.safetensors"
    paths = [path] if path.is_file() else _shards(folder, folder / (
        f"{stem}.safetensors.index{f'.{variant}' if variant else ''}.json"))
    shapes = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():                     # noqa: SIM118 (not a dictionary)
                tensor = file.get_slice(name)
                if name.endswith((".weight", ".bias")) and not tensor.get_dtype().startswith(("F", "BF")):
                    raise ValueError(f"{name} holds {tensor.get_dtype()} numbers: quantised weights are not supported")
                shapes[name] = tensor.get_shape()
    return shapes


def _shards(folder, index):
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    for name in names:
        if not isinstance(name, str) or "/" in name or not name.endswith(".safetensors"):
            raise ValueError(f"{index.name} names {name!r}, which is not a safetensors file of that folder")
    return [folder / name for name in sorted(set(names))]


def count_values(shapes: dict[str, Sequence[int]]) -> int:
    """The number of values in tensors of these {name: shape}."""
    return sum(math.prod(shape) for shape in shapes.values())


def check_exportable(weights: dict[str, torch.Tensor], what: str) -> None:
    """Raise UserError for {name: tensor} with values that are not finite, such as those beyond 65504 in fp16."""
    for name, value in weights.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"export: weights of the {what}, are not finite ({name}); if they are in another type, "
                            "take that: --dtype bf16 or fp32")
