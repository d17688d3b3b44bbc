"""Pictures of a results file: `python bench/plots.py results.json --out docs/plots`.

Writes time by kind before and after (with the floor that tensor cores set), images/s over the micro-batch, and the
kernels' bandwidth against a copy's; each only if the file has its numbers.
"""

import argparse
import json
import re
from pathlib import Path

import matplotlib
from breakdown import FLOOR

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def time_by_kind(results):
    """Stacked bars, one an implementation, out of the group whose name ends in "ms by kind"; None without one."""
    rows = next((v for k, v in results.items() if k.endswith("ms by kind")), None)
    if rows is None:
        return None
    kinds = sorted({kind for times in rows.values() for kind in times}, key=lambda kind: (kind not in FLOOR, kind))
    figure, axes = plt.subplots(figsize=(8, 1.7 + 0.7 * len(rows)), layout="constrained")
    left = dict.fromkeys(rows, 0.0)
    for i, kind in enumerate(kinds):
        widths = [times.get(kind, 0) for times in rows.values()]
        colour = plt.cm.Blues(0.9 - 0.15 * i) if kind in FLOOR else plt.cm.tab20c(4 + i % 16)
        axes.barh(list(rows), widths, left=list(left.values()), label=kind, color=colour)
        left = {name: left[name] + width for name, width in zip(rows, widths, strict=True)}
    floor = min(sum(times.get(kind, 0) for kind in FLOOR) for times in rows.values())
    axes.axvline(floor, color="black", linestyle="--", linewidth=1)
    axes.text(floor, len(rows) - 0.45, " tensor cores alone", va="bottom", fontsize=8)
    axes.set_xlabel("ms of GPU kernels, forward and backward")
    axes.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.35))
    return figure


def speed_over_micro_batch(results):
    """Images/s of the fused step over the micro-batch, with the plain ones as levels; None without at least two."""
    rows = results.get("training step, ms an image", {})
    points = sorted((int(re.search(r"\d+$", name)[0]), numbers["images_per_s"]) for name, numbers in rows.items()
                    if name.startswith("fused, micro-batch"))
    if len(points) < 2:
        return None
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.plot(*zip(*points, strict=True), "o-", label="fused, bf16, CUDA graphs")
    for i, (name, numbers) in enumerate(n for n in rows.items() if n[0].startswith("plain")):
        axes.axhline(numbers["images_per_s"], linestyle=":", color=f"C{i + 1}", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks([m for m, _ in points], [str(m) for m, _ in points])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("micro-batch")
    axes.set_ylabel("images/s, whole step")
    axes.legend(fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


def bandwidth(results):
    """GB/s of each kernel and of what it replaces, as a share of a copy's; None without numbers."""
    groups = {group: rows for group, rows in results.items() if any("share_of_copy" in n for n in rows.values())}
    if not groups:
        return None
    names = sorted({name for rows in groups.values() for name in rows}, key=lambda name: (name != "fused", name))
    figure, axes = plt.subplots(figsize=(8, 1 + 0.35 * len(groups)), layout="constrained")
    for i, name in enumerate(names):
        shares = [rows.get(name, {}).get("share_of_copy", 0) for rows in groups.values()]
        axes.barh([k - 0.8 * i / len(names) for k in range(len(groups))], shares, 0.8 / len(names), label=name)
    axes.axvline(1, color="black", linestyle="--", linewidth=1)
    axes.set_yticks([k - 0.27 for k in range(len(groups))], list(groups), fontsize=7)
    axes.margins(y=0.02)
    axes.set_xlabel("least bytes / time, as a share of a copy's bandwidth")
    axes.legend(fontsize=8, ncols=len(names), loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


PLOTS = {"time-by-kind": time_by_kind, "micro-batch": speed_over_micro_batch, "bandwidth": bandwidth}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="of pytest bench --results")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args(argv)
    measured = json.loads(args.results.read_text())
    args.out.mkdir(parents=True, exist_ok=True)
    for name, plot in PLOTS.items():
        figure = plot(measured["results"])
        if figure is not None:
            figure.suptitle(f"{measured['machine']}, torch {measured['torch']}", fontsize=9)
            figure.savefig(args.out / f"{name}.png", dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main()
