"""JSON that sidfast wrote into a run directory, read back and checked.

Such a file may be damaged, of another version, or made by someone else. Each kind has one reader, here or next to the
code that writes it, and everything that is used later is checked as it is read. Unknown keys pass: older and newer
versions have others.
"""

import errno
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, RootModel, ValidationError
from pydantic_core import PydanticCustomError

from sidfast.common.errors import UserError
from sidfast.common.explain import explain

LINES, EVALUATIONS = ("metrics.jsonl", "spikes.jsonl"), "evaluation.json"
MOST = 1e30                                              # of a metric: sums of squares of such are finite, too
_LARGEST = 2**28                                         # bytes of a JSON file
_LEVELS = 50                                             # of nested sections; a configuration has about five

Count = Annotated[int, Field(ge=0, lt=2**63)]
Measure = Annotated[float, Field(gt=-MOST, lt=MOST)]
Rate = Annotated[float, Field(gt=1 / MOST, lt=MOST)]


def _ordered(ends):
    if ends[0] > ends[1]:
        raise PydanticCustomError("reversed", "input should be the low end and then the high end")
    return ends


Interval = Annotated[list[Measure], Field(min_length=2, max_length=2), AfterValidator(_ordered)]


class Schema(BaseModel):
    """What must be in a section of a file: types are strict (a 1 is neither True nor "1"), further keys pass."""

    model_config = ConfigDict(strict=True, extra="allow")


class Intervals(Schema):
    """{metric: [low, high]}; `of` describes them."""

    of: str | None = None
    __pydantic_extra__: dict[str, Interval]


class Hardware(Schema):
    """What a run was last started on."""

    gpus: list[str] = []
    cpus: int | None = None


class RunFile(Schema):
    """config.json of a run. `config` is checked by `sidfast.config.schema`, or by those who show a part of it."""

    config: dict[str, Any]
    command: list[str] | None = None
    python: str | None = None
    versions: dict[str, str | None] = {}
    git: str | None = None
    started: str | None = None                           # for the first time, ISO 8601 in UTC
    folder: str | None = None                            # in which it was last started
    hardware: Hardware = Hardware()
    inputs: dict[str, Any] | None = None
    paths: dict[str, str] | None = None
    imports: dict[str, str] | None = None
    processes: Annotated[int, Field(ge=1, lt=2**31)] | None = None


class Line(Schema):
    """A line of a JSON lines file of a run."""

    step: Count


class Metrics(Line):
    """A line of metrics.jsonl. Losses may be infinite or NaN."""

    images: Count | None = None
    images_per_s: Rate | None = None
    tflops_per_gpu: Rate | None = None
    __pydantic_extra__: dict[str, float | None]


class Evaluation(Schema):
    """One evaluation of a run; further keys are its metrics."""

    images: Count
    step: Count | None = None
    intervals: Intervals = Intervals()
    protocol: str | None = None
    __pydantic_extra__: dict[str, float | None]


class Evaluations(RootModel[dict[str, Evaluation]]):
    """evaluation.json of a run."""


class Plain(Schema):
    """How a stock pipeline of a generator is called."""

    pipeline: str
    t_init: Count
    noise_scale: Measure
    shape: list[Count]


class Distillation(Schema):
    """distillation.json of an export, and what a result says of it."""

    teacher: str | None = None
    guidance: dict[str, Measure] = {}
    seed: int | None = None
    step: Count | None = None
    settings: str | None = None
    best_by: str | None = None
    evaluation: Evaluation = Field(None)                 # absent, but never null
    plain: Plain = Field(None)                           # as above


def parse(raw):
    """The value of JSON bytes, in strings that any file can hold. Raises ValueError, in a few words."""
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON, line {error.lineno}: {error.msg}") from None
    except RecursionError:
        raise ValueError("nested too deep") from None
    except ValueError:                                   # Python's limit on the digits of an integer
        raise ValueError("a number has too many digits") from None
    return _clean(value)


def read_json(path):
    """The value of a JSON file. Raises OSError, or ValueError in a few words."""
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"larger than {_LARGEST >> 20} MiB")
    return parse(_read(path))


def _read(path):
    if path.exists() and not path.is_file():             # reading a pipe would never end
        raise OSError(errno.EINVAL, "not a regular file")
    return path.read_bytes()


def _clean(value, level=0):
    """The same with half surrogate pairs written out: words of a command that were not UTF-8 have them."""
    if level > _LEVELS:
        raise ValueError("nested too deep")
    if isinstance(value, dict):
        return {_clean(key): _clean(item, level + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_clean(item, level + 1) for item in value]
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def check(value, kind, under=""):
    """Return `value` if it is what the Schema `kind` asks for. Raises ValueError, naming the key. `under`: what keys
    begin with."""
    try:
        kind.model_validate(value)
    except ValidationError as error:
        raise ValueError(explain(error, kind, under).removeprefix(": ")) from None
    return value


def load(path, kind, what, way_out):
    """The value of a JSON file that is a `kind`. Raises UserError "`what` (the fault); `way_out`"."""
    try:
        return check(read_json(path), kind)
    except OSError as error:
        fault = f"{path.name}: {error.strerror}"
    except ValueError as error:
        fault = error
    raise UserError(f"{what} ({fault}); {way_out}")


def read_run(run, what, way_out):
    """config.json of a run as a RunFile. Raises UserError, which begins with `what`."""
    path = Path(run) / "config.json"
    if not path.is_file():
        raise UserError(f"{what} (it needs the config.json that training writes); {way_out}")
    return load(path, RunFile, f"{what}, {path} is damaged", way_out)


def recorded(described, key):
    """A section of a run's config.json, such as "inputs" or "paths"; {} in older ones."""
    return described.get(key) or {}


def read_lines(path, kind=Line):
    """The lines of a JSON lines file of a run, without one that was being written when the run ended; none without a
    file. Raises UserError for any other line that is damaged."""
    if not path.exists():
        return
    try:
        lines = _read(path).split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); move it away") from None
    while lines and not lines[-1].strip():
        lines.pop()
    for number, text in enumerate(lines, 1):
        try:
            line = parse(text)
        except ValueError as error:
            if number == len(lines):
                return
            raise _bad_line(path, number, f"{error}: {text[:40].decode(errors='replace')!a}") from None
        try:
            yield check(line, kind)
        except ValueError as error:
            raise _bad_line(path, number, error) from None


def _bad_line(path, number, fault):
    return UserError(f"{path}, line {number}: is damaged ({fault}); mend or remove it")


def read_metrics(run):
    """The lines of a run's metrics.jsonl. Raises UserError for one that is damaged."""
    return list(read_lines(Path(run) / LINES[0], Metrics))


def training_seconds(lines):
    """Seconds that a run trained, by the rates in its metrics.jsonl: without samples, evaluations and checkpoints."""
    seconds, before = 0.0, 0
    for line in lines:
        images, rate = line.get("images"), line.get("images_per_s")
        if images and rate:
            seconds += max(0, images - before) / rate
            before = max(before, images)
    return seconds


def read_evaluations(run):
    """{name: Evaluation} of a run's evaluation.json, {} without one. Raises UserError for one that is damaged."""
    path = Path(run) / EVALUATIONS
    if not path.exists():
        return {}
    return load(path, Evaluations, f"{path}: is damaged", "mend it, or remove it and the run measures again")
