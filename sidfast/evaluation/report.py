"""RUN/report.html: one page about a training run, self-contained, made from what the run directory holds."""

import base64
import json
import re
from pathlib import Path

from sidfast.errors import UserError
from sidfast.evaluation.charts import line_chart

_CHARTS = (("Losses", {"fake_score_loss": "fake score", "generator_loss": "generator"}),
           ("Every attribute right", {"evaluation/accuracy": "accuracy"}),
           ("FID (small CLIP)", {"evaluation/fid_small_clip": "FID"}),
           ("CLIP score (small CLIP)", {"evaluation/clip_score": "CLIP score"}),
           ("Training speed, images/s", {"images_per_s": "images/s"}),
           ("Peak GPU memory, GiB", {"peak_gib": "GiB"}),
           ("Samples left out as non-finite", {"non_finite": "samples"}))
_MEASURES = (("accuracy", "every attribute"), ("clip_score", "CLIP score (small CLIP)"),
             ("fid_small_clip", "FID (small CLIP)"))


def write_report(run):
    """Write `run`/report.html. Returns its path. Raises UserError for a folder that is no run directory."""
    from jinja2 import Environment, PackageLoader

    run = Path(run)
    try:
        described = json.loads((run / "config.json").read_text(encoding="utf-8"))
        config = described["config"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"--run {run}: no run directory (it needs the config.json that training writes)") from None
    lines = _metrics(run / "metrics.jsonl")
    environment = Environment(loader=PackageLoader("sidfast.evaluation"), autoescape=True, trim_blocks=True,
                              lstrip_blocks=True)
    page = environment.get_template("report.html").render(
        name=run.resolve().name, facts=_facts(config, described, lines), charts=_charts(lines), grids=_grids(run),
        measures=_MEASURES, evaluations=_evaluations(run / "evaluation.json"), settings=_flatten(config),
        versions=described.get("versions", {}), command=" ".join(described.get("command", [])))
    path, partial = run / "report.html", run / ".report.html.partial"
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    return path


def _metrics(path):
    """The complete lines of metrics.jsonl."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:                               # the line that was being written when the run was killed
            break
    return lines


def _facts(config, described, lines):
    g, hardware = config["guidance"], described.get("hardware", {})
    images = max((line.get("images", 0) for line in lines), default=0)
    where = ", ".join(sorted(set(hardware.get("gpus", [])))) or f"{hardware.get('cpus')} CPU cores, no GPU"
    return {"Teacher": config["model"]["teacher"],
            "Guidance κ1 to κ4": " · ".join(f"{g[f'kappa{k}']:g}" for k in range(1, 5)),
            "Noise levels": config["noise"]["density"], "Batch": config["train"]["batch_size"],
            "Updates": max((line["step"] for line in lines), default=0), "Images": f"{images:,}",
            "Hardware": where, "Processes": described.get("processes"), "Code": described.get("git")}


def _charts(lines):
    """[(title, [names], svg), ...] of what was measured."""
    charts = []
    for title, keys in _CHARTS:
        series = {label: [(line["step"], line[key]) for line in lines if isinstance(line.get(key), (int, float))]
                  for key, label in keys.items()}
        if "non_finite" in keys and not any(y for points in series.values() for _, y in points):
            continue                                     # nothing was left out: nothing to show
        svg = line_chart(series, "updates")
        if svg:
            charts.append((title, list(series) if len(series) > 1 else [], svg))
    return charts


def _grids(run):
    """[{"step", "data"}, ...] of the sample grids, in order."""
    found = []
    for path in sorted((run / "samples").glob("step-*.png")):
        match = re.fullmatch(r"step-(\d+)", path.stem)
        if match:
            found.append({"step": int(match[1]), "data": base64.b64encode(path.read_bytes()).decode()})
    return found


def _evaluations(path):
    known = json.loads(path.read_text()) if path.is_file() else {}
    order = {"teacher": 0, "start": 1, "end": 3}
    return dict(sorted(known.items(), key=lambda item: (order.get(item[0], 2), len(item[0]), item[0])))


def _flatten(values, prefix=""):
    flat = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: json.dumps(value)}
    return flat
