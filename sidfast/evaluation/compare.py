"""`sidfast compare`: any number of results as a table and as points in the plane of FID and CLIP score."""

import csv
import io
import json
import shutil
from pathlib import Path

from sidfast.errors import UserError

_FIRST = ("fid", "clip_score", "accuracy")
# Zero-shot COCO-2014, 30,000 captions, ViT-g/14 (arXiv 2406.01561; method.md, section 8): kappa, FID, CLIP score.
_PAPER = {
    "SiD-LSG paper, SD 1.5": ((1.5, 8.71, 0.302), (2, 9.56, 0.313), (3, 13.21, 0.314), (4.5, 16.59, 0.317)),
    "SiD-LSG paper, SD 1.5, longer": ((1.5, 8.15, 0.304),),
    "SiD-LSG paper, SD 2.1-base": ((1.5, 9.52, 0.308), (2, 10.97, 0.318), (3, 13.50, 0.321), (4.5, 16.54, 0.322)),
}


def compare(paths, out, paper):
    """Write table.md, table.csv, and, if the results have FID and CLIP score, fid-clip.png and .svg to `out`.

    `paper` adds the published points. Raises UserError for a file that is no result, and an `out` that is in the way.
    """
    out = Path(out)
    results = [_read(Path(path)) for path in paths]
    names = _names([Path(path) for path in paths])
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; a folder is needed")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.parent} does not exist")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    header, rows = _table(names, results)
    (partial / "table.md").write_text(_markdown(header, rows, results))
    (partial / "table.csv").write_text(_csv(header, rows))
    for key in _fid_names(results, paper):
        _plot(names, results, key, paper and key == "fid", partial)
    out.mkdir(exist_ok=True)
    for file in partial.iterdir():
        file.replace(out / file.name)
    partial.rmdir()


def _read(path):
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(v, (int, float)) for v in result["metrics"].values()) or "images" not in result:
            raise ValueError
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: is no result of `sidfast evaluate`") from None
    return result


def _names(paths):
    """File names, with folders where those are not enough to tell results apart."""
    stems = [path.stem for path in paths]
    return [stem if stems.count(stem) == 1 else str(path) for stem, path in zip(stems, paths, strict=True)]


def _table(names, results):
    keys = list(dict.fromkeys(key for result in results for key in result["metrics"]))
    keys.sort(key=lambda key: next((i for i, first in enumerate(_FIRST) if key.startswith(first)), len(_FIRST)))
    rows = []
    for name, result in zip(names, results, strict=True):
        model = result["model"]
        rows.append([name, result["images"], model.get("steps"), model.get("guidance"),
                     *(result["metrics"].get(key) for key in keys)])
    return ["result", "images", "steps", "guidance", *keys], rows


def _markdown(header, rows, results):
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    notes = [f"{what}: differs between the results, so their numbers do not compare."
             for what, of in (("Image count", lambda r: r["images"]), ("Prompts", lambda r: r["prompts"]["sha256"]),
                              ("Reference", lambda r: r.get("reference", {}).get("sha256")),
                              ("Feature network", lambda r: r.get("features", {}).get("sha256")),
                              ("CLIP", lambda r: r.get("clip", {}).get("sha256")))
             if len({of(result) for result in results}) > 1]
    return "\n".join([*lines, *(f"\n{note}" for note in notes)]) + "\n"


def _cell(value):
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def _csv(header, rows):
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(["" if value is None else value for value in row] for row in rows)
    return text.getvalue()


def _fid_names(results, paper):
    """The kinds of FID that can be plotted; those of different feature networks never share a plot."""
    found = {key for result in results for key in result["metrics"] if key.startswith("fid")
             and "clip_score" in result["metrics"]}
    return sorted(found | ({"fid"} if paper else set()))


def _plot(names, results, key, paper, folder):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, result in zip(names, results, strict=True):
        if key in result["metrics"] and "clip_score" in result["metrics"]:
            axes.plot(result["metrics"]["clip_score"], result["metrics"][key], "o", label=name)
    for name, points in (_PAPER if paper else {}).items():
        kappas, fids, scores = zip(*points, strict=True)
        axes.plot(scores, fids, "o--", markerfacecolor="none", linewidth=0.8, label=name)
        for kappa, x, y in zip(kappas, scores, fids, strict=True):
            axes.annotate(f"{kappa:g}", (x, y), (4, 4), textcoords="offset points", fontsize=7)
    axes.set(xlabel="CLIP score (higher is better)", ylabel=f"{key} (lower is better)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    stem = key.replace("_", "-") + "-clip-score"
    figure.savefig(folder / f"{stem}.png", dpi=150, metadata={"Software": None})
    figure.savefig(folder / f"{stem}.svg", metadata={"Date": None, "Creator": None})
