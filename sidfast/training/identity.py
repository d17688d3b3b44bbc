"""What a run is of: its settings, its teacher and its prompts, so that a start, a checkpoint or an export of something
else is noticed, and a teacher or a prompts file that was only moved is accepted.

    config.json   inputs (`describe_inputs`), paths (`locate_inputs`)
    state.json    run (`describe_run`), in every checkpoint
"""

import hashlib
import inspect
import json
import os
import re
from pathlib import Path

import torch

from sidfast.config import build_config
from sidfast.errors import UserError
from sidfast.training.checkpoint import checksum
from sidfast.training.state import read_state

TEACHER, PROMPTS, _PARTS = "model.teacher", "data.prompts", "model.teacher.parts"
# What may differ when a run goes on: how long, how often and how it runs, not what it computes.
_FREE = ("train.steps", "train.images", "train.log_every", "train.save_every", "train.keep", "train.sample_every",
         "train.samples", "train.micro_batch", "train.fake_score_factor", "train.hang_timeout", "train.max_skipped",
         "train.spike", "evaluation", "speed", "deepspeed")
_SHARED = "speed.share_generator_forward"                # a variant of the method
_BOUND = re.compile(rf"deepspeed\.(\w+\.)?(gradient_clipping|bf16\.enabled|fp16\.enabled)|{re.escape(_SHARED)}")
_NAMES = {"unet": "UNet", "vae": "VAE", "text_encoder": "text encoder", "tokenizer": "tokenizer",
          "scheduler": "scheduler"}
_SOME = 16                                               # values of a weight that are kept in order
_NEUTRAL = ("transformers_version", "architectures", "dtype", "torch_dtype", "attn_implementation", "model_type")
_PROBES = ("a photo of a cat", "A Red CIRCLE, 42%; it's small-ish.", "über naïve 東京 🙂", "")


def check_settings(path, config):
    """Raise UserError if the run of a config.json has other settings than `config`.

    Names of a teacher and of a prompts file may differ if their fingerprints are known: `check_inputs` compares those.
    """
    try:
        described = json.loads(path.read_text())
        before = build_config(described["config"], path).model_dump()
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: is not a run's configuration; choose another --out") from None
    old, new, known = flatten(before), flatten(config.model_dump()), described.get("inputs") or {}
    moved = {TEACHER} & known.keys() | ({PROMPTS} & known.keys() if Path(config.data.prompts).is_file() else set())
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and not is_free(key) and key not in moved:
            raise UserError(f"--out {path.parent}: holds a run with another configuration ({key} is "
                            f"{old.get(key)!r} there and {new.get(key)!r} here); choose another --out")


def describe_inputs(config, teacher):
    """Fingerprints of a run's inputs: `describe_teacher`, and the SHA-256 of a prompts file under its key."""
    prompts = Path(config.data.prompts)
    return describe_teacher(teacher) | ({PROMPTS: checksum(prompts)} if prompts.is_file() else {})


def locate_inputs(config):
    """{key of the configuration: absolute path}, or the name as given of what is not a file or folder here (a hub
    id)."""
    return {key: os.path.abspath(name) if os.path.exists(name) else name
            for key, name in ((TEACHER, config.model.teacher), (PROMPTS, config.data.prompts))}


def check_inputs(out, inputs):
    """Raise UserError if a run in `out` began with other inputs (of `describe_inputs`)."""
    path = Path(out) / "config.json"
    change = input_change(json.loads(path.read_text()).get("inputs") or {}, inputs) if path.is_file() else None
    if change:
        raise UserError(f"--out {out}: {change}; put it back, or choose another --out")


def input_change(before, now):
    """Which of two runs' inputs differ, in a few words, or None. What one of them does not know is not compared."""
    change = teacher_change(before, now)
    if change:
        return f"{TEACHER} is not what it was when that run began ({change})"
    if before.get(PROMPTS, now.get(PROMPTS)) != now.get(PROMPTS, before.get(PROMPTS)):
        return f"{PROMPTS} is not what it was when that run began"
    return None


def teacher_change(before, now):
    """Which parts of two teachers differ, in a few words, or None."""
    old, new = before.get(_PARTS), now.get(_PARTS)
    if isinstance(old, dict) and isinstance(new, dict):
        names = [_NAMES[part] for part in _NAMES if old.get(part, new.get(part)) != new.get(part)]
        return f"its {' and '.join(names)} {'differ' if len(names) > 1 else 'differs'}" if names else None
    same = before.get(TEACHER, now.get(TEACHER)) == now.get(TEACHER, before.get(TEACHER))
    return None if same else "its weights or noise levels differ"


def describe_run(config, inputs):
    """What a checkpoint says of its run: the settings that may not change, and the inputs."""
    named = {TEACHER, PROMPTS} & inputs.keys()
    return {"settings": {key: value for key, value in flatten(config.model_dump()).items()
                         if not is_free(key) and key not in named}, "inputs": inputs}


def check_origin(checkpoint, config, inputs, option):
    """Raise UserError, which begins with `option`, for a checkpoint of a run with other settings or inputs.

    A checkpoint of an older version does not say; the config.json next to its folder `checkpoints` then does.
    """
    there, here = read_state(checkpoint).get("run") or _run_around(checkpoint), describe_run(config, inputs)
    here = json.loads(json.dumps(here))
    for key in sorted(there["settings"].keys() & here["settings"].keys()):
        old, new = there["settings"][key], here["settings"][key]
        if old != new:
            raise UserError(f"{option}{checkpoint} is of another run ({key} is {old!r} there and {new!r} here)")
    change = input_change(there["inputs"], here["inputs"])
    if change:
        raise UserError(f"{option}{checkpoint} is of another run ({change})")


def _run_around(checkpoint):
    path = Path(checkpoint).absolute().parents[1] / "config.json"
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        return describe_run(build_config(described["config"], path), described.get("inputs") or {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError):
        return {"settings": {}, "inputs": {}}


def describe_distillation(config, step, inputs=None):
    """What an export says of where it comes from: `sidfast.publishing.export.read_distillation`."""
    values = config.model_dump()
    seed = values["train"].pop("seed")
    rest = {key: value for key, value in flatten(values).items()
            if not is_free(key) and not key.startswith("guidance.") and (key, value) != (_SHARED, False)}
    settings = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    return {"teacher": config.model.teacher, "guidance": values["guidance"], "seed": seed, "step": step,
            "settings": settings} | ({"inputs": inputs} if inputs else {})


def describe_teacher(teacher):
    """Fingerprints of a Teacher as loaded: the one that runs of older versions have, and {part: hash}.

    A part's is of every weight (the sum of its bits, and its first values), and of those settings that are not the
    libraries' defaults, so that it stays the same in other versions of them.
    """
    networks = {name: _hash(_settings(getattr(teacher, name)), _weights(getattr(teacher, name)))
                for name in ("unet", "vae", "text_encoder")}
    levels = [f"{level:.4f}" for level in teacher.schedule.log_sigma.tolist()]
    return {TEACHER: teacher.fingerprint(), _PARTS: networks | {
        "tokenizer": _hash(_words(teacher.tokenizer)),
        "scheduler": _hash(teacher.prediction_type, levels, _settings(teacher.sampler()))}}


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


def flatten(values, prefix=""):
    """{"section.key": value} of nested dictionaries."""
    flat = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def is_free(key):
    """Whether a setting may differ when a run is resumed."""
    return not _BOUND.fullmatch(key) and any(key == f or key.startswith(f + ".") for f in _FREE)
