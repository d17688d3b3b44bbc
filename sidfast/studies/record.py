"""What a study's runs leave behind, and who works on which."""

import contextlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from sidfast.common.errors import UserError
from sidfast.common.files import locked, write_atomically
from sidfast.common.records import MOST, Count, Measure, RunFile, Schema, load
from sidfast.config.schema import build_config
from sidfast.evaluation.results import MetricName
from sidfast.studies.study import TeacherPoint

RESULT, COST, STRIP, STARTED = "result.json", "cost.json", "images.png", "config.json"
FINAL = ("done", "diverged")                             # a run that failed for any other reason is tried again


_Numbers = dict[MetricName, Measure | None]


class _Outcome(Schema):
    status: Literal["done", "diverged", "failed"]
    message: str | None


class _OfTeacher(_Outcome):
    metrics: _Numbers = Field({})
    repeats: list[_Numbers] = Field([])

    @model_validator(mode="after")
    def _measured(self):
        if self.status == "done" and not (self.metrics and self.repeats):
            raise ValueError("metrics or repeats: there are none")
        return self


class _CurvePoint(Schema):
    images: Count
    __pydantic_extra__: dict[str, Measure | None]


class _OfRun(_Outcome):
    metrics: _Numbers
    curve: list[_CurvePoint]
    config: dict[str, Any]
    evaluation: dict[str, Any]


class _Cost(Schema):
    training_s: Measure
    runs_at_once: Annotated[int, Field(ge=1, le=10**6)]
    device: str


@contextlib.contextmanager
def reserved(out, run):
    """Whether this process may work on a run: True while the block lasts, or False if another one does.

    The lock is the operating system's, on a file beside the run: it ends with the process, however that ends.
    """
    path = Path(out) / run.folder.with_name(f".{run.folder.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path) as alone:
        yield alone


def read_record(out, run, name=RESULT):
    """The JSON of a file of a Run or TeacherPoint, or None. Raises UserError for one that is damaged."""
    path = Path(out) / run.folder / name
    if not path.exists():
        return None
    kind = {COST: _Cost, STARTED: RunFile}.get(name, _OfTeacher if isinstance(run, TeacherPoint) else _OfRun)
    return load(path, kind, f"{path}: is damaged", "remove it" if name == COST else "remove it to run this again")


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
    """The numbers of a dictionary, null in place of those that are not finite, or as good as that."""
    return {name: value if abs(value) < MOST else None for name, value in values.items()
            if isinstance(value, (int, float)) and name not in ("images", "step")}


def check_record(out, study, run):
    """Raise UserError if a run that is finished, or under way, is of another study. One that failed may be mended."""
    record, started = read_record(out, run), read_record(out, run, STARTED)
    if record is not None and not is_final(record):
        return
    kept = record or started
    if kept is None:
        return
    old = {"config": build_config(kept["config"], Path(out) / run.folder).model_dump()}
    old |= {"evaluation": record["evaluation"]} if record else {}
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
