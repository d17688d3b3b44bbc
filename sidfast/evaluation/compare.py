"""`sidfast compare`: any number of results as a table and as points in the plane of FID and CLIP score."""

import csv
import io
import math
from pathlib import Path

from sidfast.common.errors import UserError
from sidfast.common.escape import markdown, plot_label, spreadsheet
from sidfast.common.files import check_folder, sweep, write_atomically
from sidfast.evaluation.charts import FONT, encode, new_figure
from sidfast.evaluation.metrics import title
from sidfast.evaluation.results import read_groups

_FIRST = ("fid", "clip_score", "accuracy")
# Zero-shot COCO-2014, 30,000 captions, ViT-g/14 (arXiv 2406.01561; method.md, section 8): kappa, FID, CLIP score.
_PAPER = {
    "SiD-LSG paper, SD 1.5": ((1.5, 8.71, 0.302), (2, 9.56, 0.313), (3, 13.21, 0.314), (4.5, 16.59, 0.317)),
    "SiD-LSG paper, SD 1.5, longer": ((1.5, 8.15, 0.304),),
    "SiD-LSG paper, SD 2.1-base": ((1.5, 9.52, 0.308), (2, 10.97, 0.318), (3, 13.50, 0.321), (4.5, 16.54, 0.322)),
}


def compare(arguments, out, paper):
    """Write table.md, table.csv, and, if the results have FID and CLIP score, fid-clip-score.png and .svg to `out`.

    `arguments`: [CURVE=]FILE|FOLDER; results that differ in seeds alone become one row, with its 95 % interval, and
    those of one CURVE one line of the plot. `paper` adds the published points. Returns the names of the files. Raises
    UserError for a file that is no result, and an `out` that is in the way.
    """
    out, groups = Path(out), read_groups(arguments)
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.parent} does not exist")
    check_folder(out)
    keys = _keys(groups)
    files = {"table.md": _markdown(groups, keys), "table.csv": _csv(groups, keys)}
    for key in _fid_names(groups, paper):
        files |= _plot(groups, key, paper and key == "fid")
    for name in files:
        if (out / name).is_dir():
            raise UserError(f"--out {out}: {name} is a folder there; choose another")
    out.mkdir(exist_ok=True)
    sweep(out)
    for name, content in files.items():
        write_atomically(out / name, content)
    return list(files)


def _keys(groups):
    keys = list(dict.fromkeys(key for group in groups for key in group.first["metrics"]))
    return sorted(keys, key=lambda key: next((i for i, first in enumerate(_FIRST) if key.startswith(first)),
                                             len(_FIRST)))


def _columns(group):
    """What a row says before the metrics."""
    return [*([group.curve] if group.curve else [""]), group.name, group.first["images"], group.runs(),
            group.first["model"].get("steps"), group.guidance()]


_HEADER = ["curve", "result", "images", "seed sets", "steps", "guidance"]


def _markdown(groups, keys):
    rows = [[*_columns(group), *(_number(group.numbers().get(key)) for key in keys)] for group in groups]
    header = [*_HEADER, *keys]
    if not any(group.curve for group in groups):
        header, rows = header[1:], [row[1:] for row in rows]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    if any(interval for group in groups for _, interval in group.numbers().values()):
        lines.append("\n± or (low to high): 95 %, by Student's t over sets of seeds where there are several, over "
                     "images where there is one.")
    notes = [f"{what}: differs between the results, so their numbers do not compare."
             for what, of in (("Image count", lambda r: r["images"]), ("Prompts", lambda r: r["prompts"]["sha256"]),
                              ("Reference", lambda r: r.get("reference", {}).get("sha256")),
                              ("Feature network", lambda r: r.get("features", {}).get("sha256")),
                              ("CLIP", lambda r: r.get("clip", {}).get("sha256")),
                              ("Resampling", lambda r: str(r.get("resampling"))))
             if len({of(group.first) for group in groups}) > 1]
    return "\n".join([*lines, *(f"\n{note}" for note in notes)]) + "\n"


def _number(value):
    """"1.968 ± 0.021", or "0.97 (0.92 to 0.99)" where the two halves differ: to the interval's second digit."""
    if value is None or value[1] is None:
        return value and value[0]
    mean, (low, high) = value
    half = (high - low) / 2
    digits = min(12, max(0, 1 - math.floor(math.log10(half)))) if half > 0 else 4
    if abs((mean - low) - (high - mean)) > 0.5 * 10**-digits:
        return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def _cell(value):
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else markdown(value)


def _csv(groups, keys):
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_HEADER, *(name for key in keys for name in (key, f"{key}_low", f"{key}_high"))])
    for group in groups:
        numbers, row = group.numbers(), _columns(group)
        for key in keys:
            value, interval = numbers.get(key, (None, None))
            row += [value, *(interval or (None, None))]
        writer.writerow(map(spreadsheet, row))
    return text.getvalue()


def _fid_names(groups, paper):
    """The kinds of FID that can be plotted; those of different feature networks never share a plot."""
    found = {key for group in groups for key in group.first["metrics"] if key.startswith("fid")
             and "clip_score" in group.first["metrics"]}
    return sorted(found | ({"fid"} if paper else set()))


def _plot(groups, key, paper):
    """{file name: contents} of one plot, as PNG and as SVG."""
    figure, axes = new_figure(7, 5)
    shown = [group for group in groups if key in group.first["metrics"] and "clip_score" in group.first["metrics"]]
    for curve in dict.fromkeys(group.curve for group in shown):
        members = [group for group in shown if group.curve == curve]
        for line in [members] if curve else [[group] for group in members]:
            _curve(axes, line, key, plot_label(curve or line[0].name))
    for name, points in (_PAPER if paper else {}).items():
        kappas, fids, scores = zip(*points, strict=True)
        axes.plot(scores, fids, "o--", markerfacecolor="none", linewidth=0.8, label=name)
        for kappa, x, y in zip(kappas, scores, fids, strict=True):
            axes.annotate(f"{kappa:g}", (x, y), (4, 4), textcoords="offset points", fontsize=9)
    axes.set(xlabel="CLIP score (higher is better)", ylabel=f"{title(key)} (lower is better)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=FONT)
    stem = key.replace("_", "-") + "-clip-score"
    return {f"{stem}.{kind}": encode(figure, kind) for kind in ("png", "svg")}


def _curve(axes, groups, key, label):
    """Points with their intervals, joined in the order of guidance, which stands beside each point of a curve."""
    groups = sorted(groups, key=lambda group: (isinstance(group.guidance(), str), group.guidance() or 0))
    points = [(group.numbers()["clip_score"], group.numbers()[key]) for group in groups]
    x, y = ([value for value, _ in of] for of in zip(*points, strict=True))
    spread = [[[max(0, value - interval[0]) if interval else 0 for value, interval in of],
               [max(0, interval[1] - value) if interval else 0 for value, interval in of]]
              for of in zip(*points, strict=True)]
    axes.errorbar(x, y, xerr=spread[0], yerr=spread[1], fmt="o-", markersize=5, linewidth=1, capsize=2, label=label)
    for group, place in zip(groups, zip(x, y, strict=True), strict=True):
        if len(groups) > 1 and group.guidance() is not None:
            axes.annotate(_cell(group.guidance()), place, (4, 4), textcoords="offset points", fontsize=9)
