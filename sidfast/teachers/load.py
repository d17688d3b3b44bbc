"""From a folder or a hub id, in the layout of diffusers, to a Teacher."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sidfast.common.errors import UserError, first_reason
from sidfast.teachers.base import Teacher
from sidfast.teachers.compatibility import check_tokenizer
from sidfast.teachers.families import ARCHITECTURES, family_of
from sidfast.teachers.folders import check_hub_id, download, find_cached, find_teacher
from sidfast.teachers.untrusted import attention_of, build_on_meta, library_of, read_index, refuse_pickles
from sidfast.teachers.weights import choose_variant, find_variants

_KEY = "model.teacher"                                   # opens messages about a teacher
_BUFFER = re.compile(r"position_ids$")                   # which older releases of transformers saved
_REST_OF_CLIP = re.compile(r"(vision_model|visual_projection|text_projection)\.|logit_scale$")
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.")


def load_teacher(name: str, what: str = _KEY, *, variant: str | None = None, revision: str | None = None,
                 scheduler: dict | None = None) -> Teacher:
    """Load a teacher by folder or hub id; safetensors only.

    `variant`, `revision`, `scheduler`: as in the configuration's section `model`. Raises UserError, which `what` opens,
    for parts that are missing or broken, do not fit each other, or make images from more than a text; before any
    weights are read where the JSON files show it.
    """
    def choose(folder):                                  # (a model that is refused is not downloaded)
        return _check(folder, what, scheduler)[0].networks

    folder = find_teacher(name, variant, revision, what, choose)
    family, index, configs, schedulers = _check(folder, what, scheduler)
    for part in family.networks:
        refuse_pickles(folder / part, what, "diffusers.DiffusionPipeline", folder)
    if variant is not None and not any(variant in find_variants(folder / part) for part in family.networks):
        raise UserError(f"model.variant: {folder} has no weights of the variant {variant!r}")
    tokenizers = _load_tokenizers(folder, family, configs, what)
    networks = {part: load_network(folder / part, family.class_of(part), what, variant=variant)
                for part in family.networks}
    for module in networks.values():
        module.float().eval().requires_grad_(False)
    return _assemble(family, folder, networks, tokenizers, schedulers, scheduler, index)


def load_meta_teacher(name: str, what: str = _KEY, *, variant: str | None = None, revision: str | None = None,
                      scheduler: dict | None = None) -> Teacher:
    """The Teacher without weights, its networks on the meta device, of a folder, of a hub id in the cache (nothing is
    downloaded), or of an architecture.

    Options as those of `load_teacher`. Raises UserError for anything else, and for what training refuses.
    """
    if name in ARCHITECTURES:
        family = ARCHITECTURES[name]
        own = family.build_scheduler(name, scheduler or {})
        with torch.device("meta"):
            networks = family.build(name)
        return _assemble(family, None, networks, {}, (own, own), scheduler)
    folder = _find_configurations(name, revision)
    family, index, configs, schedulers = _check(folder, what, scheduler)
    tokenizers = _load_tokenizers(folder, family, configs, what)
    networks = {part: _without_weights(folder / part, family.class_of(part), what, variant)
                for part in family.networks}
    return _assemble(family, folder, networks, tokenizers, schedulers, scheduler, index)


def load_prompt_limit(name: str, what: str) -> tuple[Any, int]:
    """(Tokenizer, the most tokens of a prompt, start and end included) of a teacher, given as a folder or a hub id, of
    which no weights are downloaded. Raises UserError, which `what` opens, also where prompts may have any length."""
    if not Path(name).is_dir():
        check_hub_id(name, what)
        try:
            name = str(download(name, choose=lambda folder: ()))
        except Exception as error:                       # the hub library raises its own, the network's and the OS's
            raise UserError(f"{what}: not a folder here, and the hub did not give it ({first_reason(error)})") from None
    limit = load_meta_teacher(name, what).prompt_limit()
    if limit is None:
        raise UserError(f"{what}: its text encoder takes prompts of any length; leave --teacher out")
    return limit


def _check(folder, what, changes):
    """(Family, model_index.json, configurations, (scheduler for exports, scheduler of the teacher's own images)) of a
    folder."""
    index = read_index(folder, what)
    family = family_of(index)
    configs = family.check(folder, what)
    return family, index, configs, family.schedulers(folder, configs, what, changes or {})


def _load_tokenizers(folder, family, configs, what):
    from transformers import AutoTokenizer

    tokenizers = {}
    for part, encoder in family.tokenizers.items():
        tokenizers[part] = _load(folder / part, AutoTokenizer, what, trust_remote_code=False)
        check_tokenizer(folder / part, tokenizers[part], configs[encoder], what)
    return tokenizers


def _assemble(family, folder, networks, tokenizers, schedulers, changes, index=None):
    family.adapt(networks[family.network])
    parts = networks | tokenizers | {"scheduler": schedulers[0]}
    return Teacher(family, folder, parts, family.schedule(schedulers[0]), schedulers[1], changes or {}, index or {})


def _without_weights(folder, cls, what, variant):
    """A network on the meta device. Its weights need not be there; if they are, they must be as large."""
    there = bool(find_variants(folder))
    variant = choose_variant(folder, what, variant) if there else None
    return build_on_meta(folder, cls, what, variant, weights=there)


def _find_configurations(teacher, revision):
    """The folder of a teacher's configurations, which is all that is needed of it."""
    if Path(teacher).is_dir():
        return find_teacher(teacher, revision=revision)
    hint = f"or give --architecture {'|'.join(ARCHITECTURES)}"
    try:
        check_hub_id(teacher, _KEY)
        return find_cached(teacher, revision)
    except UserError as error:
        raise UserError(f"{error}; {hint}") from None
    except Exception:                                    # the library's own, for a name that is none as well
        raise UserError(f"{_KEY}: {teacher} is not a folder and not in the hub's cache here; its configurations are "
                        f"needed, {hint}") from None


def load_network(folder: Path, cls: Any, what: str, variant: str | None = None, **options) -> Any:
    """A network of diffusers or transformers from a folder's safetensors, every weight of which is there and finite.

    `variant`: of the weights, such as "fp16" (`choose_variant`); `options`: of `from_pretrained`. Raises UserError,
    which `what` opens, for a folder that is broken, asks for code, or has other weights than its config.json describes.
    """
    folder = Path(folder)
    variant = choose_variant(folder, what, variant)
    build_on_meta(folder, cls, what, variant)
    if variant is not None:
        options["variant"] = variant
    options |= {"low_cpu_mem_usage": False} if library_of(cls) == "diffusers" else attention_of(cls)
    # (low_cpu_mem_usage needs another library)
    network, found = _load(folder, cls, what, use_safetensors=True, output_loading_info=True, **options)
    for verb, keys in {"lacks": found["missing_keys"], "has, but its config.json does not know,": [
            key for key in found["unexpected_keys"] if not _is_left_out(key, network)]}.items():
        if keys:
            raise UserError(f"{what}: {folder} {verb} {len(keys)} of the network's tensors ({min(keys)})")
    check_finite_weights(network, f"{what}: {folder}")
    return network


def check_finite_weights(network: nn.Module, what: str) -> None:
    """Raise UserError, which `what` opens, for a network with a weight that is not finite."""
    for name, value in network.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"{what}: {name} has values that are not finite")


def _is_left_out(key, network):
    """Whether a network is complete without a tensor of its file: a buffer, the rest of a CLIP whose text encoder it
    is, or a layer beyond the last one that its configuration asks for (clip skip), as diffusers has it."""
    if _BUFFER.search(key):
        return True
    if type(network).__name__ != "CLIPTextModel":
        return False
    layer = _LAYER.search(key)
    return bool(_REST_OF_CLIP.match(key)) or bool(layer and int(layer[1]) >= network.config.num_hidden_layers)


def _load(folder, cls, what, **options):
    try:
        return cls.from_pretrained(str(folder), **options)
    except Exception as error:                           # each library has exceptions of its own for a broken folder
        raise UserError(f"{what}: {folder} cannot be loaded ({first_reason(error)})") from None
