"""RUN/report.html: one page about a training run, self-contained, made from what the run directory holds."""

import base64
import io
import json
import os
import re
import shlex
from pathlib import Path
from typing import Annotated

from PIL import Image
from pydantic import Field

from sidfast.common.errors import UserError, one_line
from sidfast.common.extras import need
from sidfast.common.files import write_atomically
from sidfast.common.records import (
    Count,
    Evaluation,
    Measure,
    Schema,
    check,
    read_evaluations,
    read_json,
    read_metrics,
    read_run,
    recorded,
    training_seconds,
)
from sidfast.evaluation.charts import line_chart
from sidfast.evaluation.metrics import lower_is_better, title
from sidfast.publishing.export import read_distillation
from sidfast.publishing.grid import read_grid
from sidfast.teachers.fingerprint import TEACHER

_CHARTS = (("Losses", {"fake_score_loss": "fake score", "generator_loss": "generator"}),
           ("Gradient norms, before clipping", {"gradient_norm/fake_score": "fake score",
                                                "gradient_norm/generator": "generator"}),
           ("Learning rates", {"learning_rate/fake_score": "fake score", "learning_rate/generator": "generator"}),
           ("Training speed, images/s", {"images_per_s": "images/s"}),
           ("Peak GPU memory, GiB", {"peak_gib": "GiB"}),
           ("Samples left out as non-finite", {"non_finite": "samples"}))
_MEANS = ("accuracy", "clip_score")
_DOCS = Path(__file__).parents[2] / "docs"               # of a checkout
_FRAMES, _SIDE, _SMALL = 24, 256, 128                    # steps in the slider; pixels of an image; of one kept as it is


def write_report(run, running=False):
    """Write `run`/report.html. Returns its path. Raises UserError for a folder that is no run directory.

    `running`: whether a job is at work in it.
    """
    need("jinja2", "report", "report.html")
    from jinja2 import Environment, PackageLoader

    run = Path(run)
    described = _read_run(run)
    evaluations, lines = _evaluations(run, described), read_metrics(run)
    environment = Environment(loader=PackageLoader("sidfast.evaluation"), autoescape=True, trim_blocks=True,
                              lstrip_blocks=True)
    page = environment.get_template("report.html").render(
        name=one_line(run.resolve().name), facts=_facts(described["config"], described, lines, running),
        charts=_charts(lines, evaluations.get("teacher", {})),
        samples=_samples(run), headline=_headline(evaluations), table=_table(evaluations),
        settings=_flatten(described["config"]),
        small_clip=any("_small_clip" in key for values in evaluations.values() for key in values),
        versions={"python": described.get("python"), **described.get("versions", {})},
        command=_command(described, Path.cwd()), docs=os.path.relpath(_DOCS, run) if _DOCS.is_dir() else None)
    write_atomically(run / "report.html", page)
    return run / "report.html"


class _Kappas(Schema):
    kappa1: Measure
    kappa2: Measure
    kappa3: Measure
    kappa4: Measure


class _Model(Schema):
    teacher: str


class _Noise(Schema):
    density: str


class _Train(Schema):
    batch_size: Annotated[int, Field(ge=1, lt=2**63)]
    steps: Count | None = None
    images: Count | None = None


class _Data(Schema):
    prompts: str


class _Shown(Schema):                                    # of a configuration, which may be an older version's
    data: _Data
    guidance: _Kappas
    model: _Model
    noise: _Noise
    train: _Train


def _read_run(run):
    what, way_out = f"--run {run}: no run directory", "name another"
    described = read_run(run, what, way_out)
    try:
        check(described["config"], _Shown, "config.")
    except ValueError as error:
        raise UserError(f"{what}, {run / 'config.json'} is damaged ({error}); {way_out}") from None
    return described


def _command(described, here):
    """The command that goes on with a run, as one would type it in the folder `here`: with the launcher, and without
    what that adds."""
    if not described.get("command"):
        return None
    program, *words = described["command"]
    words = [_relative(word, here) for word in words if not word.startswith(("--local_rank=", "--local-rank="))]
    if Path(program).name == "train.py":
        gpus = recorded(described, "hardware").get("gpus") and described.get("processes")
        words = ["deepspeed", *(["--num_gpus", str(gpus)] if gpus else []), _relative(program, here), *words]
    else:
        words = [Path(program).name, *words]
    folder = described.get("folder")
    return (f"cd {shlex.quote(folder)} && " if folder and folder != str(here) else "") + shlex.join(words)


def _relative(word, here):
    """A word of a command, with a path in it (/a/b, --out=/a/b) seen from `here` if it lies below."""
    head, equals, path = word.rpartition("=")
    if not Path(path).is_absolute() or not Path(path).is_relative_to(here):
        return word
    return f"{head}{equals}{Path(path).relative_to(here)}"


def _facts(config, described, lines, running):
    g, train, hardware = config["guidance"], config["train"], described.get("hardware", {})
    images = max((line.get("images") or 0 for line in lines), default=0)
    gpus, seconds = hardware.get("gpus", []), training_seconds(lines)
    where = ", ".join(sorted(set(gpus))) or f"{hardware.get('cpus')} CPU cores, no GPU"
    return {"Teacher": config["model"]["teacher"],
            "Guidance κ1 to κ4": " · ".join(f"{g[f'kappa{k}']:g}" for k in range(1, 5)),
            "Noise levels": config["noise"]["density"], "Batch": f"{train['batch_size']:,}",
            "Updates": _updates(train, max((line["step"] for line in lines), default=0), running),
            "Images": f"{images:,}", "Started": _date(described.get("started")),
            "Training, without samples and measures": duration(seconds) if seconds else None,
            "GPU-hours of training": f"{seconds * described['processes'] / 3600:.3g}"
            if seconds and gpus and described.get("processes") else None,
            "Hardware": where, "Processes": described.get("processes"),
            "Code": (described.get("git") or "")[:12] or None}


def _updates(train, done, running):
    """"120 of 240, stopped"."""
    if not (train.get("steps") or train.get("images")):  # (a configuration of another version)
        return f"{done:,}"
    total = train.get("steps") or -(-train["images"] // train["batch_size"])
    return f"{done:,} of {total:,}" + ("" if done >= total else ", running" if running else ", stopped")


def _date(started):
    """"2026-12-01 17:55 UTC", of what config.json has."""
    return started and f"{started[:16].replace('T', ' ')} UTC"


def duration(seconds):
    """"6 min 10 s", "2 h 5 min" or "3 d 4 h"."""
    for unit, above, size, below in (("d", 86400, 3600, "h"), ("h", 3600, 60, "min"), ("min", 60, 1, "s")):
        if seconds >= above:
            whole = round(seconds / size)
            return f"{whole * size // above} {unit} {whole * size % above // size} {below}"
    return f"{seconds:.1f} s"


def _charts(lines, teacher):
    """[(title, svg), ...] of what was measured."""
    charts = []
    for name in dict.fromkeys(key.removeprefix("evaluation/") for line in lines for key in line
                              if key.startswith("evaluation/")):
        if name.startswith("accuracy_") or name in ("images", "kid_std"):
            continue
        level = ("teacher", teacher[name]) if isinstance(teacher.get(name), float) else None
        charts.append(_chart(lines, title(name), {f"evaluation/{name}": "student"}, level, log=name.startswith("fid")))
    for name, keys in _CHARTS:
        if "non_finite" in keys and not any(line.get("non_finite") for line in lines):
            continue                                     # nothing was left out: nothing to show
        charts.append(_chart(lines, name, keys, log=name.startswith("Gradient")))
    return [chart for chart in charts if chart[-1]]


def _chart(lines, name, keys, level=None, log=False):
    series = {label: [(line["step"], line[key]) for line in lines if line.get(key) is not None]
              for key, label in keys.items()}
    return name, line_chart(series, "updates", level, log)


def _samples(run):
    """What the slider shows: {"prompts", "rows": labels and images that stay, "frames": of the student}, or None."""
    files = sorted(path for path in (run / "samples").glob("step-*.png")
                   if re.fullmatch(r"step-[0-9]+", path.stem) and path.is_file())
    last = len(files) - 1
    kept = range(last + 1) if last < _FRAMES else [round(i * last / (_FRAMES - 1)) for i in range(_FRAMES)]
    found = None
    for path in [files[i] for i in reversed(kept)]:      # (one by one: they may be large)
        grid = read_grid(path)
        if not grid or not grid[0]:
            continue
        prompts, rows = grid
        *still, (_, students) = rows.items()
        if found is None:
            found = {"prompts": prompts, "frames": [], "small": students[0].width <= _SMALL,
                     "rows": [(label, [_data(image) for image in images]) for label, images in still]}
        if prompts == found["prompts"]:                  # (train.samples may have been changed)
            found["frames"].insert(0, {"step": int(path.stem[5:]), "images": [_data(image) for image in students]})
    return found


def _data(image):
    """An image as a data URI: small ones as they are, others at most 256 pixels wide as WebP."""
    file, small = io.BytesIO(), image.width <= _SMALL
    if image.width > _SIDE or image.height > 4 * _SIDE:
        image.thumbnail((_SIDE, 4 * _SIDE), Image.Resampling.LANCZOS, reducing_gap=None)
    image.save(file, **({"format": "PNG", "optimize": True} if small else {"format": "WEBP", "quality": 88}))
    kind = "png" if small else "webp"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _evaluations(run, described):
    """{name: numbers} of the teacher, the start, and the best and the last generator."""
    known = read_evaluations(run)
    if known and "teacher" not in known:
        known |= _of_card(described)
    steps = sorted((values.get("step") or 0, name) for name, values in known.items() if name.startswith("step "))
    last = ["end"] if "end" in known else [name for _, name in steps[-1:]]               # (while the run goes on)
    best = read_distillation(run / "best").get("evaluation")
    if last and best and best.get("protocol") == known[last[0]].get("protocol"):
        known["best"] = best
    return {name: known[name] for name in ("teacher", "start", "best", *last) if name in known}


def _of_card(described):
    """The toy teacher's own numbers, where a run of the shapes world did not measure it: those that are means over
    images, and so are the same for another count of them."""
    config = described["config"]
    if not config["data"]["prompts"].startswith("shapes:") or config.get("evaluation", {}).get("prompts"):
        return {}
    place = str(recorded(described, "paths").get(TEACHER, config["model"]["teacher"]))
    try:
        numbers = read_json(Path(place) / "numbers.json")[f"guidance {config['guidance']['kappa4']:.1f}"]
        values = check(numbers, Evaluation)
    except (OSError, ValueError, TypeError, KeyError):   # another teacher, or another guidance
        return {}
    shown = {key: value for key, value in values.items() if key == "images" or key.startswith(_MEANS)}
    return {"teacher": shown | {"source": "of its own card"}}


def _names(evaluations):
    return [name for name in dict.fromkeys(name for values in evaluations.values() for name in values)
            if any(isinstance(values.get(name), float) for values in evaluations.values())
            and not name.startswith("accuracy_")]


def _headline(evaluations):
    """[{"title", "value", "interval", "others"}, ...]: the last generator's numbers, and those they stand beside."""
    if not evaluations:
        return []
    *others, last = evaluations
    found = []
    for name in _names(evaluations):
        value, interval = _number(evaluations[last], name)
        beside = [(other, _number(evaluations[other], name)[0]) for other in others if other in ("teacher", "start")]
        found.append({"title": title(name), "value": value, "interval": interval, "others": beside,
                      "better": "lower is better" if lower_is_better(name) else "higher is better"})
    return found


def _table(evaluations):
    """(header, rows) of the final table."""
    names = _names(evaluations)
    rows = []
    for name, values in evaluations.items():
        step = values.get("step")
        after = f"after {step:,} updates" if name in ("best", "end") and step is not None else values.get("source", "")
        rows.append((name, after, values["images"], [_number(values, key) for key in names]))
    return [title(name) for name in names], rows


def _number(values, name):
    """(the value, its 95 % interval or ""), both as text."""
    if not isinstance(values.get(name), (int, float)):
        return "", ""
    interval = values.get("intervals", {}).get(name)
    return f"{values[name]:.4g}", f"{interval[0]:.4g} to {interval[1]:.4g}" if interval else ""


def _flatten(values, prefix=""):
    flat = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: json.dumps(value)}
    return flat
