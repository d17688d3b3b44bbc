"""Results of `sidfast evaluate`, read back, and those of one model with different seeds taken together."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from sidfast.common.errors import UserError
from sidfast.common.records import Count, Distillation, Intervals, Measure, Schema, load, read_json
from sidfast.evaluation.metrics import over_repeats, title

MetricName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]{1,100}$")]             # (files are named after metrics)


class _Prompts(Schema):
    sha256: str | None


class _Network(Schema):                                  # or images, the reference
    sha256: str | None = None


class _Model(_Network):
    path: str | None = None
    steps: Count | None = None
    guidance: Measure | None = None
    dtype: str | None = None
    distillation: Distillation = Distillation()


class _Seeds(Schema):
    first: Count
    last: Count
    per_prompt: Count | None = None


class Result(Schema):
    """What `sidfast evaluate` writes; later versions may add to it."""

    model: _Model
    prompts: _Prompts
    images: Count
    metrics: Annotated[dict[MetricName, Measure], Field(min_length=1)]
    intervals: Intervals = Intervals()
    reference: _Network = _Network()
    features: _Network = _Network()
    clip: _Network = _Network()
    seeds: _Seeds | None = None
    repeats: Annotated[list[Schema], Field(min_length=1)] = Field(None)          # absent, but never null


@dataclass
class Group:
    """Results that differ in their seeds alone. `curve`: the name of the line that it belongs to, or None."""

    name: str
    curve: str | None
    results: list

    @property
    def first(self):
        """One of the results, for all that they have in common."""
        return self.results[0]

    def numbers(self):
        """{metric: (value, (low, high) or None)}: the mean and Student's t over several results, or the one result's
        own interval."""
        metrics = self.first["metrics"]
        if len(self.results) > 1:
            return over_repeats([result["metrics"] for result in self.results])
        intervals = self.first.get("intervals", {})
        return {name: (value, intervals.get(name)) for name, value in metrics.items()}

    def runs(self):
        """How many sets of images the numbers are of."""
        return sum(len(result.get("repeats", [0])) for result in self.results)

    def guidance(self):
        """The scale that the images were made at: a sampler's, or all the kappas of a distillation as text."""
        model = self.first["model"]
        kappas = [v for k, v in sorted(model.get("distillation", {}).get("guidance", {}).items()) if "kappa" in k]
        if not kappas:
            return model.get("guidance")
        return kappas[0] if len(set(kappas)) == 1 else " / ".join(f"{k:g}" for k in kappas)


def read_groups(arguments):
    """Groups out of `[CURVE=]FILE|FOLDER` arguments, in their order; a folder stands for the results in it.

    Raises UserError for what is no result, and for one file given twice.
    """
    groups, seen = {}, {}
    for argument in arguments:
        curve, path = _split(argument)
        for file in _files(path):
            if file.resolve() in seen:
                raise UserError(f"{file}: is given twice")
            seen[file.resolve()] = file
            result = _read(file)
            groups.setdefault((curve, _identity(result)), []).append((file, result))
    found = [group for (curve, _), members in groups.items() for group in _apart(curve, members)]
    names = [group[1][0][0].stem for group in found]
    return [Group(_name(files, names), curve, [result for _, result in files]) for curve, files in found]


def result_table(result):
    """The metrics of a result as lines of text, with their intervals."""
    rows = [("metric", "value", "95 % interval")]
    for name, value in result["metrics"].items():
        low_high = result["intervals"].get(name)
        rows.append((title(name), f"{value:.4g}", f"{low_high[0]:.4g} to {low_high[1]:.4g}" if low_high else ""))
    first, second = (max(len(row[k]) for row in rows) for k in range(2))
    return "\n".join(f"{name:<{first}}  {value:>{second}}  {interval}".rstrip() for name, value, interval in rows)


def is_result(path):
    """Whether a file was written by `sidfast evaluate`, of this version or another."""
    try:
        result = read_json(path)
    except (OSError, ValueError):
        return False
    return isinstance(result, dict) and result.keys() >= {"model", "prompts", "images", "metrics"}


def _split(argument):
    """(curve or None, path); a path that exists may have a `=` in it."""
    curve, equals, path = argument.partition("=")
    return (curve, Path(path)) if equals and curve and not Path(argument).exists() else (None, Path(argument))


def _files(path):
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("*.json"), key=_natural)
    if not files:
        raise UserError(f"{path}: no result (*.json) in it")
    return files


def _natural(path):
    parts = re.split(r"([0-9]+(?:\.[0-9]+)?)", path.stem)                         # text and numbers by turns
    return [float(part) if k % 2 else part for k, part in enumerate(parts)]


def _read(path):
    if not path.exists():
        raise UserError(f"{path}: no such file")
    return load(path, Result, f"{path}: is no result of `sidfast evaluate`", "leave it out")


def _identity(result):
    """All that a result depends on but seeds, as text: those of the images, and that of a student's training."""
    model = result["model"]
    distilled = {k: v for k, v in model.get("distillation", {}).items()
                 if k in ("teacher", "inputs", "guidance", "step", "settings")}
    same = distilled or [model.get("sha256"), None if model.get("sha256") else model.get("path")]
    hashes = [result.get(key, {}).get("sha256") for key in ("prompts", "reference", "features", "clip")]
    return json.dumps([same, *(model.get(key) for key in ("steps", "guidance", "dtype")), result["images"], hashes,
                       result.get("tf32", False), result.get("resampling"), sorted(result["metrics"]),
                       (result.get("seeds") or {}).get("per_prompt")], sort_keys=True)


def _apart(curve, members):
    """(curve, members) once, or once for each member that shares images with one before it: these are no repeats."""
    together, alone, taken = [], [], {}
    for file, result in members:
        seeds, model = result.get("seeds"), result["model"]
        student = model.get("distillation", {}).get("seed", model.get("sha256"))     # (others are other images anyway)
        spans = taken.setdefault(student, [])
        span = (seeds["first"], seeds["last"]) if seeds else None
        if span is None or any(span[0] <= last and first <= span[1] for first, last in spans):
            alone.append((curve, [(file, result)]))
        else:
            spans.append(span)
            together.append((file, result))
    return ([(curve, together)] if together else []) + alone


def _name(files, names):
    """File names, with folders where those are not enough to tell results apart."""
    stem = files[0][0].stem
    return (stem if names.count(stem) == 1 else str(files[0][0])) + (f" and {len(files) - 1} more" if files[1:] else "")
