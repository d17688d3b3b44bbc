"""table.md: a study's numbers, to be read."""

import math

from sidfast.common import escape
from sidfast.studies.results import metric_names

LABELS = {"fid": "FID", "clip_score": "CLIP score", "accuracy": "accuracy", "kid": "KID", "precision": "precision",
          "recall": "recall", "diversity": "diversity"}


def label(metric):
    """How a metric is called: `fid_small_clip` -> "FID (small CLIP)"."""
    stem = next((name for name in LABELS if metric.startswith(name)), None)
    if stem is None:
        return metric
    rest = metric.removeprefix(stem).strip("_").replace("_", " ").replace("clip", "CLIP")
    return f"{LABELS[stem]} ({rest})" if rest else LABELS[stem]


def rows(results, costs):
    """(header, rows of text, [[clear, ...], ...]): the table; a cell is clear if its interval of the difference
    leaves 0 out."""
    metrics, reference = metric_names(results), results["reference"]
    device = sorted({cost["device"] for runs in costs.values() for cost in runs.values()})
    header = ["variant", "seeds"]
    for metric in metrics:
        header += [label(metric), f"less {reference}"]
    header.append("CPU-seconds" if device == ["CPU"] else "GPU-seconds" if device else "seconds")
    body, marks = [], []
    for name, variant in results["variants"].items():
        cells, clear = [name, _seeds(variant["runs"], results["seeds"])], [False, False]
        for metric in metrics:
            difference = variant["difference"].get(metric)
            cells += [_cell(variant["summary"].get(metric)), _cell(difference, "+")]
            clear += [False, bool(difference and difference["n"] > 1 and difference["low"] * difference["high"] > 0)]
        seconds = [cost["device_s"] for cost in costs[name].values()]
        cells.append(f"{sum(seconds) / len(seconds):.0f}" if seconds else "")
        body.append(cells)
        marks.append([*clear, False])
    for point in results["teacher"]:
        cells = [f"teacher, 50 steps, guidance {point['guidance']:g}", ""]
        for metric in metrics:
            cells += [_cell(point["summary"].get(metric)), ""]
        body.append([*cells, ""])
        marks.append([False] * len(header))
    return header, body, marks


def notes(results, costs):
    """What has to be known to read the table, a sentence each."""
    found = [f"Mean over seeds ± half its 95 % interval (Student's t), after {results['images']:,} images. \"less "
             f"{results['reference']}\": mean difference to {results['reference']} of the same seed. In bold: its "
             "interval leaves out 0."]
    comparisons = sum(len([m for m in metric_names(results) if m in v["difference"]])
                      for v in results["variants"].values())
    if comparisons > 1:
        found.append(f"{comparisons} differences stand here: without any effect about {0.05 * comparisons:.1g} of them "
                     "would be bold by chance.")
    if results["teacher"]:
        found.append("The teacher: one training of it; its intervals are over sets of noise.")
    if len(results["seeds"]) == 1:
        found.append("One seed: nothing here tells an effect from chance.")
    for name, variant in results["variants"].items():
        for seed, run in variant["runs"].items():
            if run["status"] != "done":
                found.append(f"{name}, seed {seed}: {run['status']} ({run['message']}); left out.")
    shared = sorted({c["runs_at_once"] for runs in costs.values() for c in runs.values() if c["runs_at_once"] > 1})
    devices = sorted({c["device"] for runs in costs.values() for c in runs.values()})
    if devices:
        found.append(f"Seconds: of the updates alone, mean over seeds, on {', '.join(devices)}" + (
            f"; the time of runs that shared a device, up to {shared[-1]} at once, is divided among them" if shared
            else "") + ".")
    return found


def markdown(results, costs):
    """table.md as text."""
    header, body, marks = rows(results, costs)
    lines = [f"# {escape.markdown(results['study'])}", "", *map(escape.markdown, results["question"].splitlines()), "",
             "| " + " | ".join(header) + " |", "|---|---|" + "---:|" * (len(header) - 2)]
    for cells, clear in zip(body, marks, strict=True):
        lines.append("| " + " | ".join(f"**{c}**" if bold else c for c, bold in zip(cells, clear, strict=True)) + " |")
    return "\n".join([*lines, *(f"\n{escape.markdown(note)}" for note in notes(results, costs))]) + "\n"


def _seeds(runs, seeds):
    done = [run for run in runs.values() if run["status"] == "done"]
    text = f"{len(done)}/{len(seeds)}"
    for status in ("diverged", "failed"):
        count = sum(run["status"] == status for run in runs.values())
        text += f", {count} {status}" if count else ""
    return text


def _cell(value, sign=""):
    if value is None:
        return ""
    half = 0 if value["low"] is None else value["high"] - value["mean"]
    if half == 0:
        return f"{value['mean']:{sign}.4g}" + ("" if value["low"] is None else " ± 0")
    places = min(max(0, 1 - math.floor(math.log10(half))), 8)                # two digits of the interval
    return f"{value['mean']:{sign}.{places}f} ± {half:.{places}f}"
