"""What a study's runs leave behind, and who works on which."""

import contextlib
import fcntl
import json
import math
from pathlib import Path

from sidfast.config import build_config
from sidfast.errors import UserError
from sidfast.files import write_atomically

RESULT, COST, STRIP = "result.json", "cost.json", "images.png"
FINAL = ("done", "diverged")                             # a run that failed for any other reason is tried again


@contextlib.contextmanager
def claimed(out, run):
    """Whether this process may work on a run: True while the block lasts, or False if another one does.

    The lock is the operating system's, on a file beside the run: it ends with the process, however that ends.
    """
    path = Path(out) / run.folder.with_name(f".{run.folder.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


def read_record(out, run, name=RESULT):
    """The JSON of a run's file, or None."""
    try:
        return json.loads((Path(out) / run.folder / name).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{Path(out) / run.folder / name}: cannot be read ({error}); remove it to run this "
                        "again") from None


def is_final(record):
    """Whether a run needs no more work."""
    return record is not None and record["status"] in FINAL


def write_record(out, study, run, status, message=None, metrics=None, curve=()):
    """Keep a run's outcome; it stands for the run from now on."""
    write_outcome(out, run, status, message, metrics=clean(metrics or {}), curve=[
        {"images": images, **clean(values)} for images, values in curve],
        config=run.config.model_dump(), evaluation=study.file.evaluation.model_dump())


def write_outcome(out, item, status, message=None, **values):
    """The same of a run or a TeacherPoint, with whatever `values` are to be kept."""
    (Path(out) / item.folder).mkdir(parents=True, exist_ok=True)
    record = {"status": status, "message": message, **values}
    write_atomically(Path(out) / item.folder / RESULT, json.dumps(record, indent=1) + "\n")


def clean(values):
    """The numbers of a dictionary, null in place of those that are not finite."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()
            if isinstance(value, (int, float)) and name not in ("images", "step")}


def check_record(out, study, run):
    """Raise UserError if a run that is finished, or under way, is of another study. One that failed may be mended."""
    record, started = read_record(out, run), read_record(out, run, "config.json")
    if record is not None and not is_final(record):
        return
    kept = record or started
    if kept is None:
        return
    try:
        old = {"config": build_config(kept["config"], Path(out) / run.folder).model_dump()}
        old |= {"evaluation": record["evaluation"]} if record else {}
    except (KeyError, TypeError):
        raise UserError(f"--out {out}: {run.folder} is no run of a study; choose another --out") from None
    new = {"config": run.config.model_dump()} | (
        {"evaluation": study.file.evaluation.model_dump()} if record else {})
    for key, (before, now) in _differences(old, json.loads(json.dumps(new))):
        raise UserError(f"--out {out}: holds {run.variant}, seed {run.seed}, of another study ({key} is {before!r} "
                        f"there and {now!r} here); choose another --out")


def has_other_config(out, run):
    """Whether a run failed with a configuration that has changed since."""
    record = read_record(out, run)
    return record is not None and not is_final(record) and any(
        _differences(record["config"], json.loads(json.dumps(run.config.model_dump()))))


def _differences(old, new, prefix=""):
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}".removeprefix("config."), (a, b)
