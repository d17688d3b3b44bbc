"""Fingerprints of a teacher, part by part: the same wherever it lies, and in other versions of the libraries."""

import hashlib
import inspect
import json
from typing import Any

import torch

from sidfast.teachers.base import NAMES

TEACHER, PARTS = "model.teacher", "model.teacher.parts"  # their keys
_SOME = 16                                               # values of a weight that are kept in order
_NEUTRAL = ("transformers_version", "architectures", "dtype", "torch_dtype", "attn_implementation", "model_type")
_PROBES = ("a photo of a cat", "A Red CIRCLE, 42%; it's small-ish.", "\u00fcber na\u00efve \u6771\u4eac", "")


def describe_teacher(teacher: Any) -> dict[str, Any]:
    """Fingerprints of a Teacher as loaded: the one that runs of older versions have, and {part: hash}.

    A part's is of every weight (the sum of its bits, and its first values), and of those settings that are not the
    libraries' defaults, so that it stays the same in other versions of them.
    """
    parts = {name: _hash(_settings(module), _weights(module)) for name, module in teacher.networks.items()}
    parts |= {name: _hash(_words(teacher.parts[name])) for name in teacher.family.tokenizers}
    parts["scheduler"] = _hash(teacher.schedule.prediction_type, _levels(teacher), _settings(teacher.sampler()))
    return {TEACHER: fingerprint(teacher), PARTS: parts}


def fingerprint(teacher: Any) -> str:
    """A hash that tells a teacher from others: of its kind of prediction, its noise levels, and some values of each of
    its weights. Older versions know no other."""
    digest = hashlib.sha256(f"{teacher.schedule.prediction_type} {_levels(teacher)}".encode())
    for module in teacher.networks.values():
        for name, tensor in module.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.flatten()[:_SOME].tolist()}".encode())
    return digest.hexdigest()


def _levels(teacher):
    return [f"{level:.4f}" for level in teacher.schedule.log_sigma(torch.arange(len(teacher.schedule))).tolist()]


def _hash(*values):
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def _weights(module):
    found = []
    for name, tensor in module.state_dict().items():
        flat = tensor.detach().to("cpu", torch.float32).flatten()
        flat = flat.clone() if flat.storage_offset() % 2 else flat               # (for the view below)
        pairs = len(flat) // 2 * 2
        total = flat[:pairs].view(torch.int64).sum().item() if pairs else 0      # (whole numbers: in any order)
        found.append((name, tuple(tensor.shape), total, flat[pairs:].tolist(), flat[:_SOME].tolist()))
    return found


def _settings(part):
    """{key: value} of a part's configuration as far as it differs from the defaults."""
    if hasattr(part.config, "to_diff_dict"):
        values = part.config.to_diff_dict()
    else:
        usual = {name: p.default for name, p in inspect.signature(type(part).__init__).parameters.items()}
        values = {key: value for key, value in part.config.items()
                  if key in usual and _plain(value) != _plain(usual[key])}
    return {key: value for key, value in values.items() if key not in _NEUTRAL and not key.startswith("_")}


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


def _words(tokenizer):
    """What a tokenizer makes of texts: its vocabulary, merges and lengths, and the tokens of some texts."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = json.loads(backend.to_str())["model"] if backend else {}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or []]
    ids = tokenizer(list(_PROBES), padding="max_length", truncation=True, max_length=tokenizer.model_max_length)
    return [sorted(tokenizer.get_vocab().items()), merges, tokenizer.model_max_length, ids["input_ids"]]


def teacher_change(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Which parts of two teachers differ, in a few words, or None."""
    old, new = before.get(PARTS), now.get(PARTS)
    if isinstance(old, dict) and isinstance(new, dict):
        names = [NAMES.get(part, part) for part in new if old.get(part, new[part]) != new[part]]
        return f"its {' and '.join(map(str, names))} {'differ' if len(names) > 1 else 'differs'}" if names else None
    same = before.get(TEACHER, now.get(TEACHER)) == now.get(TEACHER, before.get(TEACHER))
    return None if same else "its weights or noise levels differ"
