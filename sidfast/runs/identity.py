"""What a run is of: its settings, its teacher and its prompts, so that a start, a checkpoint or an export of something
else is noticed, and a teacher or a prompts file that was only moved is accepted.

    config.json   inputs (`describe_inputs`), paths (`locate_inputs`), imports (`import_modules`)
    state.json    run (`describe_run`), in every checkpoint
"""

import hashlib
import json
import os
import re
from pathlib import Path

from sidfast.checkpoints.format import read_state
from sidfast.checkpoints.store import by_age, checksum
from sidfast.common.errors import UserError
from sidfast.common.records import read_run, recorded
from sidfast.config.schema import build_config
from sidfast.teachers.fingerprint import TEACHER, describe_teacher, teacher_change

PROMPTS = "data.prompts"
# What may differ when a run goes on: how long, how often and how it runs, not what it computes.
_FREE = ("train.steps", "train.images", "train.log_every", "train.save_every", "train.save_minutes", "train.keep",
         "train.sample_every", "train.samples", "train.micro_batch", "train.fake_score_factor", "train.hang_timeout",
         "train.max_skipped", "train.spike", "train.tracker", "evaluation", "speed", "deepspeed")
_SHARED = "speed.share_generator_forward"                # a variant of the method
_LATER = ((_SHARED, False), ("data.prompts_column", None), ("model.variant", None), ("model.revision", None))
# (keys that older runs do not have, at their defaults)
_BOUND = re.compile(rf"deepspeed\.(\w+\.)?(gradient_clipping|bf16\.enabled|fp16\.enabled)|{re.escape(_SHARED)}")


def check_settings(path, config):
    """Raise UserError if the run of a config.json has other settings than `config`.

    Names of a teacher and of a prompts file may differ if their fingerprints are known: `check_inputs` compares those.
    """
    described = read_own(path.parent)
    before = build_config(described["config"], path).model_dump()
    old, new, known = flatten(before), flatten(config.model_dump()), recorded(described, "inputs")
    moved = {TEACHER} & known.keys() | ({PROMPTS} & known.keys() if Path(config.data.prompts).is_file() else set())
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and not is_free(key) and key not in moved:
            newest = next(iter(by_age(path.parent / "checkpoints")), None)
            instead = f" (and --resume {newest} to start from its weights)" if newest else ""
            raise UserError(f"--out {path.parent}: holds a run with another configuration ({key} is "
                            f"{old.get(key)!r} there and {new.get(key)!r} here); choose another --out{instead}")


def describe_inputs(config, teacher):
    """Fingerprints of a run's inputs: `describe_teacher`, and the SHA-256 of a prompts file under its key."""
    prompts = Path(config.data.prompts)
    return describe_teacher(teacher) | ({PROMPTS: checksum(prompts)} if prompts.is_file() else {})


def locate_inputs(config):
    """{key of the configuration: absolute path}, or the name as given of what is not a file or folder here (a hub
    id)."""
    return {key: _locate(name) for key, name in ((TEACHER, config.model.teacher), (PROMPTS, config.data.prompts))}


def _locate(name):
    return os.path.abspath(name) if os.path.exists(name) else name


def check_inputs(out, inputs):
    """Raise UserError if a run in `out` began with other inputs (of `describe_inputs`)."""
    there = (Path(out) / "config.json").is_file()
    change = input_change(recorded(read_own(Path(out)), "inputs"), inputs) if there else None
    if change:
        raise UserError(f"--out {out}: {change}; put it back, or choose another --out")


def check_imports(out, imports):
    """Raise UserError if a run in `out` began with a module of `--import` that is missing now or has changed."""
    there = (Path(out) / "config.json").is_file()
    for name, digest in (recorded(read_own(Path(out)), "imports") if there else {}).items():
        if name not in imports:
            raise UserError(f"--out {out}: that run began with --import {name}; give it again, or choose another --out")
        if imports[name] != digest:
            raise UserError(f"--import {name}: is not what it was when the run in {out} began; put it back, or choose "
                            "another --out")


def input_change(before, now):
    """Which of two runs' inputs differ, in a few words, or None. What one of them does not know is not compared."""
    change = teacher_change(before, now)
    if change:
        return f"{TEACHER} is not what it was when that run began ({change})"
    if before.get(PROMPTS, now.get(PROMPTS)) != now.get(PROMPTS, before.get(PROMPTS)):
        return f"{PROMPTS} is not what it was when that run began"
    return None


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
    run = Path(checkpoint).absolute().parents[1]
    try:
        described = read_own(run)
        return describe_run(build_config(described["config"], run / "config.json"), recorded(described, "inputs"))
    except UserError:                                    # (not in a run, or an older one)
        return {"settings": {}, "inputs": {}}


def read_own(out):
    """config.json of a run that is to be resumed. Raises UserError."""
    return read_run(out, f"{out / 'config.json'}: is not a run's configuration", "choose another --out")


def describe_distillation(config, step, inputs=None):
    """What an export says of where it comes from: `sidfast.publishing.export.read_distillation`."""
    values = config.model_dump()
    seed = values["train"].pop("seed")
    rest = {key: value for key, value in flatten(values).items()
            if not is_free(key) and not key.startswith("guidance.") and (key, value) not in _LATER}
    settings = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    return {"teacher": _locate(config.model.teacher), "guidance": values["guidance"], "seed": seed, "step": step,
            "settings": settings} | ({"inputs": inputs} if inputs else {})


def flatten(values, prefix=""):
    """{"section.key": value} of nested dictionaries."""
    flat = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def is_free(key):
    """Whether a setting may differ when a run is resumed."""
    return not _BOUND.fullmatch(key) and any(key == f or key.startswith(f + ".") for f in _FREE)
