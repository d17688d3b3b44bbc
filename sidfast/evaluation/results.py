"""Results of `sidfast evaluate`, read back, and those of one model with different seeds taken together."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from sidfast.errors import UserError
from sidfast.evaluation.metrics import over_repeats


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


def is_result(path):
    """Whether a file was written by `sidfast evaluate`, of this version or another."""
    try:
        return json.loads(path.read_text(encoding="utf-8")).keys() >= {"model", "prompts", "images", "metrics"}
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


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
    return [float(t) if t[0].isdigit() else t for t in re.findall(r"\d+(?:\.\d+)?|\D+", path.stem)]


def _read(path):
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        metrics, model = result["metrics"], result["model"]
        if not metrics or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in metrics.values()):
            raise ValueError
        hash(tuple(result.get(key, {}).get("sha256") for key in ("prompts", "reference", "features", "clip")))
        if not isinstance(model, dict) or not isinstance(result["images"], int) or "sha256" not in result["prompts"]:
            raise ValueError
        _try(result)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path}: is no result of `sidfast evaluate`") from None
    return result


def _try(result):
    """Read once all that will be needed, so that whatever a broken file has in its place is found now."""
    group, seeds = Group("", None, [result]), result.get("seeds")
    hash((_identity(result), group.guidance(), result["model"].get("steps"), group.runs()))
    hash(tuple((result.get(key) or {}).get("sha256") for key in ("prompts", "reference", "features", "clip")))
    hash((result["model"].get("sha256"), seeds and seeds["last"] - seeds["first"]))
    for value, interval in group.numbers().values():
        hash(interval and value - interval[0] + interval[1])


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
