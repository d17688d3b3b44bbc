"""The model card of an export: what it is, how it was made, how good it is, and whose licence it is under."""

import json
import re
from pathlib import Path

from sidfast.files import write_atomically
from sidfast.networks.teacher_files import find_readme
from sidfast.publishing.export import read_distillation

_SKIPPED = ("images", "step", "intervals", "protocol")


def write_card(run, export, title):
    """Write README.md, and the run's last sample grid as grid.png, into an export of a run directory, if it is there.

    `title(name)`: what people call a metric.
    """
    run, export = Path(run), Path(export)
    if not export.is_dir():
        return
    grids = sorted((run / "samples").glob("step-*.png"))
    if grids:
        write_atomically(export / "grid.png", grids[-1].read_bytes())
    path = run / "evaluation.json"
    numbers = json.loads(path.read_text()) if path.is_file() else {}
    described = json.loads((run / "config.json").read_text())
    text = _card(described["config"], described.get("versions", {}), numbers, read_distillation(export), bool(grids),
                 title)
    write_atomically(export / "README.md", text)


def _card(config, versions, numbers, distillation, grid, title):
    g, teacher = config["guidance"], config["model"]["teacher"]
    head, terms = _licence(teacher)
    kappas = ", ".join(f"{g[f'kappa{k}']:g}" for k in range(1, 5))
    settings = {"teacher": f"`{teacher}`", "guidance kappa1 to kappa4": kappas, "alpha": config["loss"]["alpha"],
                "noise levels": f"{config['noise']['density']}, t {config['noise']['t_min']} to "
                                f"{config['noise']['t_max']}", "t_init": config["noise"]["t_init"],
                "batch": config["train"]["batch_size"], "prompts": f"`{config['data']['prompts']}`"}
    if "step" in distillation:
        settings["after updates"] = distillation["step"]
    if "best_by" in distillation:
        settings["chosen as the best of the run by"] = title(distillation["best_by"])
    settings |= {name: versions[name] for name in ("torch", "diffusers") if versions.get(name)}
    parts = [f"---\nlibrary_name: diffusers\npipeline_tag: text-to-image\n{head}---",
             "# A one-step text-to-image generator",
             "Distilled from a Stable Diffusion teacher, without images, by Score identity Distillation with Long and "
             "Short\nGuidance ([arXiv 2406.01561](https://arxiv.org/abs/2406.01561)) with sidfast.",
             '    pipe = DiffusionPipeline.from_pretrained("THIS FOLDER", trust_remote_code=True)\n'
             '    image = pipe("a prompt").images[0]']
    if grid:
        parts.append("![samples: teacher, student at the start, student at the end of the run](grid.png)")
    if numbers:
        parts += ["## Numbers", _numbers(numbers, title)]
    parts += ["## Settings", _table(("setting", "value"), settings.items()), "## Licence", terms]
    return "\n\n".join(parts) + "\n"


def _numbers(numbers, title):
    names = dict.fromkeys(key for n in numbers.values() for key in n
                          if key not in _SKIPPED and not key.startswith("accuracy_"))
    rows = [(name, n["images"], *(_value(n, key) for key in names)) for name, n in numbers.items()]
    note = "95 % intervals over the images stand in brackets."
    if any(key.endswith("_small_clip") for key in names):
        note += (" FID and CLIP score are in the features of the small CLIP of the\nshapes world: no Inception FID, no "
                 "OpenAI CLIP score.")
    return _table(("generator", "images", *map(title, names)), rows) + "\n\n" + note


def _value(numbers, key):
    if key not in numbers:
        return ""
    interval = numbers.get("intervals", {}).get(key)
    return f"{numbers[key]:.4g}" + (f" ({interval[0]:.4g} to {interval[1]:.4g})" if interval else "")


def _table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(str(value) for value in row) + " |" for row in rows])


def _licence(teacher):
    """(YAML line of the card's head, a sentence), from the `license` in the head of the teacher's own README.md."""
    path, is_folder = find_readme(teacher), Path(teacher).is_dir()
    where = "folder" if is_folder else "README.md on the hub"
    text = path.read_text(encoding="utf-8", errors="replace") if path else ""
    head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license:[ \t]*(\S+)[ \t]*$", head[1], re.MULTILINE) if head else None
    if found:
        return f"license: {found[1]}\n", f"That of the teacher: `{found[1]}`, as its {where} states."
    stated = f"The teacher's {where} states no licence" if path or is_folder else (
        f"That of the teacher, `{teacher}`, whose README.md was not at hand when this card was written")
    return "", f"{stated}; its terms, wherever stated,\napply to this model too."
