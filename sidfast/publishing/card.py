"""The model card of an export: what it is, how it was made, how good it is, and whose licence it is under."""

import re
from pathlib import Path

from sidfast.common.errors import one_line
from sidfast.common.files import write_atomically
from sidfast.common.records import read_evaluations, read_metrics, read_run, recorded, training_seconds
from sidfast.publishing.export import read_distillation
from sidfast.publishing.plain import plain_recipe
from sidfast.teachers.fingerprint import TEACHER
from sidfast.teachers.folders import find_readme

OLDEST = "diffusers 0.30.3 with transformers 4.44.2"     # (the pipeline file says so too)
_LICENCE, _HUB_ID = re.compile(r"[\w.+-]+"), re.compile(r"[\w.-]+/[\w.-]+")
_SKIPPED = ("images", "step", "intervals", "protocol")
_TAGS = ("one-step", "distillation", "sid-lsg", "sidfast")
_VERSIONS = ("sidfast", "torch", "diffusers", "transformers")
_ABOUT = """Distilled from a Stable Diffusion teacher, without images, by Score identity Distillation with Long and
Short Guidance ([arXiv 2406.01561](https://arxiv.org/abs/2406.01561)) with sidfast."""
_USE = """```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("THIS FOLDER", trust_remote_code=True)
image = pipe("a prompt").images[0]
```"""
_CITATION = """```bibtex
@inproceedings{zhou2025guided,
  title     = {Guided Score identity Distillation for Data-Free One-Step Text-to-Image Generation},
  author    = {Zhou, Mingyuan and Wang, Zhendong and Zheng, Huangjie and Huang, Hai},
  booktitle = {International Conference on Learning Representations},
  year      = {2025},
  url       = {https://arxiv.org/abs/2406.01561}
}
```"""


def write_card(run, export, title, teacher=None):
    """Write README.md, and the sample grid of the same step as grid.png, into an export of a run directory, if it is
    there. Numbers and grid are of that step, or left out.

    `title(name)`: what people call a metric; `teacher`: where the run's teacher is, if it was moved.
    """
    run, export = Path(run), Path(export)
    if not export.is_dir():
        return
    described, distillation = read_run(run, f"--run {run}: no run directory", "name another"), read_distillation(export)
    config, step = described["config"], distillation.get("step")
    grid = None if step is None else run / "samples" / f"step-{step:08d}.png"
    if grid and grid.is_file():
        write_atomically(export / "grid.png", grid.read_bytes())
    else:
        (export / "grid.png").unlink(missing_ok=True)
    name = config["model"]["teacher"]
    place, plain = recorded(described, "paths").get(TEACHER), distillation.get("plain")
    text = _card(name, place == name, teacher or str(place or name), _numbers(read_evaluations(run), distillation),
                 _settings(config, distillation, title) | _cost(run, described, step),
                 (export / "grid.png").is_file(), title, plain_recipe(plain) if plain else _USE)
    write_atomically(export / "README.md", text)


def _numbers(known, distillation):
    """{row: numbers} of the teacher, of the start, and of the generator after the very step of an export."""
    step, own = distillation.get("step"), distillation.get("evaluation")
    own = own or next((n for n in known.values() if step and n.get("step") == step), None)
    rows = {name: known[name] for name in ("teacher", "start") if name in known}
    if own is None:
        return rows
    same = (None, own.get("protocol"))                   # (of another evaluation, numbers do not compare)
    return {name: n for name, n in rows.items() if n.get("protocol") in same} | {"this generator": own}


def _settings(config, distillation, title):
    g, noise = config["guidance"], config["noise"]
    settings = {"teacher": _code(config["model"]["teacher"]),
                "guidance kappa1 to kappa4": ", ".join(f"{g[f'kappa{k}']:g}" for k in range(1, 5)),
                "alpha": config["loss"]["alpha"],
                "noise levels": f"{noise['density']}, t {noise['t_min']} to {noise['t_max']}",
                "t_init": noise["t_init"],
                "batch": config["train"]["batch_size"], "prompts": _code(config["data"]["prompts"])}
    step = distillation.get("step")
    if step is not None:
        settings |= {"after updates": step, "images seen": f"{step * config['train']['batch_size']:,}"}
    if "best_by" in distillation:
        settings["chosen as the best of the run by"] = _plain(title(distillation["best_by"]))
    return settings


def _cost(run, described, step):
    """Time until the step of an export, hardware and versions, as rows of the table."""
    lines = [line for line in read_metrics(run) if step is not None and line["step"] <= step]
    hours, hardware = training_seconds(lines) / 3600, described.get("hardware", {})
    gpus, processes = hardware.get("gpus"), described.get("processes") or 1
    rows = {"hours of training": f"{hours:.3g}"} if hours else {}
    if gpus:
        rows |= {"GPU-hours": f"{hours * processes:.3g}"} if hours else {}
        rows["hardware"] = f"{processes} x {_plain(', '.join(sorted(set(gpus))))}"
    elif hardware.get("cpus"):
        rows["hardware"] = f"{hardware['cpus']} CPU cores"
    versions = described.get("versions", {})
    return rows | {name: _plain(versions[name]) for name in _VERSIONS if versions.get(name)}


def _card(teacher, of_hub, place, numbers, settings, grid, title, use):
    licence, terms = _licence(teacher, place)
    head = ["library_name: diffusers", "pipeline_tag: text-to-image", *licence,
            *([f"base_model: {teacher}"] if of_hub and _HUB_ID.fullmatch(teacher) else []), "tags:",
            *(f"- {tag}" for tag in _TAGS)]
    parts = ["\n".join(["---", *head, "---"]), "# A one-step text-to-image generator", _ABOUT, use,
             f"The oldest versions that such a folder was tried with: {OLDEST}."]
    if grid:
        parts.append("![samples: teacher, student at the start, this generator](grid.png)")
    if numbers:
        parts += ["## Numbers", _numbers_table(numbers, title)]
    parts += ["## Settings", _table(("setting", "value"), settings.items()), "## Licence", terms, "## Citation",
              _CITATION]
    return "\n\n".join(parts) + "\n"


def _numbers_table(numbers, title):
    names = dict.fromkeys(key for n in numbers.values() for key in n
                          if key not in _SKIPPED and not key.startswith("accuracy_"))
    rows = [(name, n["images"], *(_value(n, key) for key in names)) for name, n in numbers.items()]
    note = "95 % intervals over the images stand in brackets."
    if any(key.endswith("_small_clip") for key in names):
        note += (" FID and CLIP score are in the features of the small CLIP of the\nshapes world: no Inception FID, no "
                 "OpenAI CLIP score.")
    return _table(("generator", "images", *(_plain(title(name)) for name in names)), rows) + "\n\n" + note


def _value(numbers, key):
    if numbers.get(key) is None:
        return ""
    interval = numbers.get("intervals", {}).get(key)
    return f"{numbers[key]:.4g}" + (f" ({interval[0]:.4g} to {interval[1]:.4g})" if interval else "")


def _table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(str(value) for value in row) + " |" for row in rows])


def _licence(teacher, place):
    """([YAML line of the card's head], a sentence), from the `license` in the head of the teacher's own README.md,
    which is in the folder `place`, or on the hub under that id."""
    path, is_folder = find_readme(place), Path(place).is_dir()
    where = "folder" if is_folder else "README.md on the hub"
    text = path.read_text(encoding="utf-8", errors="replace") if path else ""
    head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license:[ \t]*(\S.*?)[ \t]*$", head[1], re.MULTILINE) if head else None
    if found:
        name = found[1].strip("\"'")
        line = [f"license: {name}"] if _LICENCE.fullmatch(name) else []          # (the hub takes no other)
        return line, f"That of the teacher: {_code(name)}, as its {where} states."
    stated = f"The teacher's {where} states no licence" if path or is_folder else (
        f"That of the teacher, {_code(teacher)}, whose README.md was not at hand when this card was written")
    return [], f"{stated}; its terms, wherever stated,\napply to this model too."


def _code(text):
    """Text of others as a code span, also in a table: nothing in it is Markdown, and it stays in its line."""
    text = one_line(text, 300)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text[:1] == "`" or text[-1:] == "`" or not text.strip() else ""
    return f"{fence}{space}{text}{space}{fence}".replace("|", "\\|")


def _plain(text):
    """Text of others as plain text."""
    return re.sub(r"([\\`*_{}\[\]<>#|$~&!])", r"\\\1", one_line(text, 300))
