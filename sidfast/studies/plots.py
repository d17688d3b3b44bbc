"""A study's plots, as PNG and SVG: FID against CLIP score, and each metric variant by variant and against training
images."""

import math

from sidfast.evaluation.charts import FONT, logarithmic, new_figure
from sidfast.studies.results import interval, metric_names
from sidfast.studies.table import label

_MARKERS = "os^Dv<>PX*"


def plots(results):
    """{file stem: matplotlib Figure}; those for which there are no numbers are left out."""
    metrics, found = metric_names(results), {}
    clip = next((m for m in metrics if m.startswith("clip_score")), None)
    for metric in metrics:
        if metric.startswith("fid") and clip:
            found["fid-clip"] = _against(results, clip, metric)
    for metric in metrics:
        found[f"{_stem(metric)}-variants"] = _by_variant(results, metric)
        if any(len(run["curve"]) > 1 for variant in results["variants"].values() for run in variant["runs"].values()):
            found[f"{_stem(metric)}-images"] = _over_images(results, metric)
    return {name: figure for name, figure in found.items() if figure is not None}


def _stem(metric):
    return metric.replace("_", "-")


def _styles(results):
    """{variant: (colour, marker)}: the reference is black."""
    from matplotlib import colormaps

    colors = colormaps["tab10"].colors
    others = [name for name in results["variants"] if name != results["reference"]]
    styles = {name: (colors[i % 10], _MARKERS[i // 10 + i % 3]) for i, name in enumerate(others)}
    return styles | {results["reference"]: ("black", "o")}


def _against(results, x, y):
    """A point for each variant with the intervals of both means, and a small one for each seed."""
    figure, axes = new_figure(8, 5)
    teacher = [point for point in results["teacher"] if {x, y} <= point["summary"].keys()]
    heights = [point["summary"][y]["mean"] for point in teacher]
    drawn = False
    for name, (color, marker) in _styles(results).items():
        variant = results["variants"][name]
        if x not in variant["summary"] or y not in variant["summary"]:
            continue
        for run in variant["runs"].values():
            if run["status"] == "done" and None not in (point := [run["metrics"].get(m) for m in (x, y)]):
                axes.plot(*point, ".", color=color, markersize=4, alpha=0.6)
        means, spread = _means([variant["summary"]], x, y)
        heights += means[1]
        axes.errorbar(*means, **spread, color=color, marker=marker, markersize=7, linewidth=0.8, capsize=2, label=name)
        drawn = True
    if not drawn:
        return None
    if teacher:
        means, spread = _means([point["summary"] for point in teacher], x, y)
        axes.errorbar(*means, **spread, color="gray", marker="s", markerfacecolor="white", linestyle="--", capsize=2,
                      label="teacher, 50 steps")
        for point, *place in zip(teacher, *means, strict=True):
            axes.annotate(f"{point['guidance']:g}", place, textcoords="offset points", xytext=(5, 5), color="gray",
                          fontsize=FONT)
    axes.set(xlabel=f"{label(x)} (higher is better)", ylabel=f"{label(y)} (lower is better)")
    if 0 < 10 * min(heights) < max(heights):
        logarithmic(axes)
    return _finish(figure, axes)


def _means(summaries, x, y):
    """([x means], [y means]) and the half widths of their intervals, as errorbar takes them."""
    means = [[summary[m]["mean"] for summary in summaries] for m in (x, y)]
    spread = [[0 if summary[m]["low"] is None else summary[m]["high"] - summary[m]["mean"] for summary in summaries]
              for m in (x, y)]
    return means, {f"{axis}err": half for axis, half in zip("xy", spread, strict=True) if any(half)}


def _by_variant(results, metric):
    """A row for each variant with a finished run: a dot for each seed, the mean and its interval; a line where the
    reference's mean is. The axis has room for all dots; an interval that is wider ends there in an arrow."""
    names = [name for name, variant in results["variants"].items() if metric in variant["summary"]]
    if not names:
        return None
    figure, axes = new_figure(8, 1.2 + 0.24 * len(names))
    values = {name: [value for run in results["variants"][name]["runs"].values() if run["status"] == "done"
                     and (value := run["metrics"].get(metric)) is not None] for name in names}
    colors = {name: "black" if name == results["reference"] else "tab:blue" for name in names}
    for row, (name, color) in enumerate(colors.items()):
        summary = results["variants"][name]["summary"][metric]
        axes.plot(values[name], [row] * len(values[name]), ".", color=color, markersize=5, alpha=0.6)
        half = None if summary["low"] is None else summary["high"] - summary["mean"]
        axes.errorbar(summary["mean"], row, xerr=half, color=color, marker="|", markersize=9, linewidth=1, capsize=2)
        if name == results["reference"]:
            axes.axvline(summary["mean"], color=color, linewidth=0.8, linestyle=":")
    _room(axes, metric, [value for found in values.values() for value in found])
    for row, (name, color) in enumerate(colors.items()):
        _mark_cut(axes, row, results["variants"][name]["summary"][metric], color)
    axes.set(xlabel=f"{label(metric)}: seeds, their mean and its 95 % interval", yticks=range(len(names)),
             yticklabels=names, ylim=(len(names) - 0.5, -0.5))
    axes.grid(alpha=0.3)
    return figure


def _mark_cut(axes, row, summary, color):
    """Arrows where an interval goes on beyond the axis."""
    left, right = axes.get_xlim()
    for edge, arrow, cut in ((left, "<", summary["low"] is not None and summary["low"] < left),
                             (right, ">", summary["high"] is not None and summary["high"] > right)):
        if cut:
            axes.plot(edge, row, arrow, color=color, markersize=5, clip_on=False)


def _room(axes, metric, values):
    """Limits of the x axis around all values; a logarithmic axis where FIDs differ much."""
    low, high = min(values), max(values)
    if metric.startswith("fid") and 0 < 4 * low < high:
        logarithmic(axes, "x")
        axes.set(xlim=(low / 1.2, high * 1.2))
    elif low < high:
        left = low - 0.1 * (high - low)
        axes.set(xlim=(max(left, 0) if metric.startswith("fid") else left, high + 0.1 * (high - low)))


def _over_images(results, metric):
    """A line for each variant through the means over seeds, with the interval as a band."""
    figure, axes = new_figure(8, 5)
    drawn, lowest, highest = False, math.inf, 0.0
    for name, (color, marker) in _styles(results).items():
        by_images = {}
        for run in results["variants"][name]["runs"].values():
            for point in run["curve"] if run["status"] == "done" else ():
                if point["images"] and point.get(metric) is not None:  # (the start is the same for all, far off)
                    by_images.setdefault(point["images"], []).append(point[metric])
        seeds = max(map(len, by_images.values()), default=0)                     # (a mean over fewer is another mean)
        points = [(n, interval(values)) for n, values in sorted(by_images.items()) if len(values) == seeds]
        if not points:
            continue
        drawn = True
        lowest, highest = (f([old, *(y["mean"] for _, y in points)]) for f, old in ((min, lowest), (max, highest)))
        axes.plot([x for x, _ in points], [y["mean"] for _, y in points], color=color, marker=marker, markersize=4,
                  linewidth=2 if name == results["reference"] else 1.2, label=name)
        if all(y["low"] is not None for _, y in points):
            axes.fill_between([x for x, _ in points], [y["low"] for _, y in points], [y["high"] for _, y in points],
                              color=color, alpha=0.1, linewidth=0)
    if not drawn:
        return None
    axes.set(xlabel="training images", ylabel=label(metric))
    if metric.startswith("fid") and 0 < 10 * lowest < highest:
        logarithmic(axes)
        axes.set(ylim=(lowest / 2, None))
    elif metric.startswith("fid"):
        axes.set(ylim=(0, None))
    return _finish(figure, axes)


def _finish(figure, axes):
    axes.grid(alpha=0.3)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, fontsize=FONT, loc="outside right upper")
    return figure
