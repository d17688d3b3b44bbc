"""The model card of an export: what it is, how it was made, how good it is, and whose licence it is under."""

import re
from pathlib import Path

from sidfast.common.errors import one_line
from sidfast.common.files import write_atomically
from sidfast.common.records import read_evaluations, read_run, recorded
from sidfast.publishing.export import read_distillation
from sidfast.teachers.fingerprint import TEACHER
from sidfast.teachers.folders import find_readme

OLDEST = "diffusers 0.30.3 with transformers 4.44.2"     # (the pipeline file says so too)
_STEP, _LICENCE = re.compile(r"step-(\d+)"), re.compile(r"[\w.+-]+")
_SKIPPED = ("images", "step", "intervals", "protocol")


def write_card(run, export, title, teacher=None):
    """Write README.md, and the sample grid that belongs to it as grid.png, into an export of a run directory, if it is
    there.

    `title(name)`: what people call a metric; `teacher`: where the run's teacher is, if it was moved.
    """
    run, export = Path(run), Path(export)
    if not export.is_dir():
        return
    described, distillation = read_run(run, f"--run {run}: no run directory", "name another"), read_distillation(export)
    step = distillation.get("step")
    grid = _grid(run, step)
    if grid:
        write_atomically(export / "grid.png", grid.read_bytes())
    else:
        (export / "grid.png").unlink(missing_ok=True)
    # (those of the teacher and of the start, whose steps are None and 0, and of this generator; of no other)
    numbers = {name: n for name, n in read_evaluations(run).items()
               if step is None or n.get("step", step) in (None, 0, step)}
    config = described["config"]
    place = teacher or str(recorded(described, "paths").get(TEACHER, config["model"]["teacher"]))
    text = _card(config, described.get("versions", {}), numbers, distillation, grid is not None, title, place)
    write_atomically(export / "README.md", text)


def _grid(run, step):
    """The newest sample grid of a run that is not of a later step, or None."""
    grids = {path: _STEP.fullmatch(path.stem) for path in sorted((run / "samples").glob("step-*.png"))}
    return next((path for path, found in reversed(grids.items())
                 if found and (step is None or int(found[1]) <= step)), None)


def _card(config, versions, numbers, distillation, grid, title, place):
    g, teacher = config["guidance"], config["model"]["teacher"]
    head, terms = _licence(teacher, place)
    kappas = ", ".join(f"{g[f'kappa{k}']:g}" for k in range(1, 5))
    settings = {"teacher": _code(teacher), "guidance kappa1 to kappa4": kappas, "alpha": config["loss"]["alpha"],
                "noise levels": f"{config['noise']['density']}, t {config['noise']['t_min']} to "
                                f"{config['noise']['t_max']}", "t_init": config["noise"]["t_init"],
                "batch": config["train"]["batch_size"], "prompts": _code(config["data"]["prompts"])}
    if "step" in distillation:
        settings["after updates"] = distillation["step"]
    if "best_by" in distillation:
        settings["chosen as the best of the run by"] = _plain(title(distillation["best_by"]))
    settings |= {name: versions[name] for name in ("torch", "diffusers", "transformers") if versions.get(name)}
    parts = [f"---\nlibrary_name: diffusers\npipeline_tag: text-to-image\n{head}---",
             "# A one-step text-to-image generator",
             "Distilled from a Stable Diffusion teacher, without images, by Score identity Distillation with Long and "
             "Short\nGuidance ([arXiv 2406.01561](https://arxiv.org/abs/2406.01561)) with sidfast.",
             '    pipe = DiffusionPipeline.from_pretrained("THIS FOLDER", trust_remote_code=True)\n'
             '    image = pipe("a prompt").images[0]',
             f"The oldest versions that such a folder was tried with: {OLDEST}."]
    if grid:
        parts.append("![samples: teacher, student at the start, student at a later step of the run](grid.png)")
    if numbers:
        parts += ["## Numbers", _numbers(numbers, title)]
    parts += ["## Settings", _table(("setting", "value"), settings.items()), "## Licence", terms]
    return "\n\n".join(parts) + "\n"


def _numbers(numbers, title):
    names = dict.fromkeys(key for n in numbers.values() for key in n
                          if key not in _SKIPPED and not key.startswith("accuracy_"))
    rows = [(_plain(name), n["images"], *(_value(n, key) for key in names)) for name, n in numbers.items()]
    note = "95 % intervals over the images stand in brackets."
    if any(key.endswith("_small_clip") for key in names):
        note += (" FID and CLIP score are in the features of the small CLIP of the\nshapes world: no Inception FID, no "
                 "OpenAI CLIP score.")
    return _table(("generator", "images", *(_plain(title(name)) for name in names)), rows) + "\n\n" + note


def _value(numbers, key):
    if key not in numbers:
        return ""
    interval = numbers.get("intervals", {}).get(key)
    return f"{numbers[key]:.4g}" + (f" ({interval[0]:.4g} to {interval[1]:.4g})" if interval else "")


def _table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(str(value) for value in row) + " |" for row in rows])


def _licence(teacher, place):
    """(YAML line of the card's head, a sentence), from the `license` in the head of the teacher's own README.md, which
    is in the folder `place`, or on the hub under that id."""
    path, is_folder = find_readme(place), Path(place).is_dir()
    where = "folder" if is_folder else "README.md on the hub"
    text = path.read_text(encoding="utf-8", errors="replace") if path else ""
    head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license:[ \t]*(\S.*?)[ \t]*$", head[1], re.MULTILINE) if head else None
    if found:
        name = found[1].strip("\"'")
        line = f"license: {name}\n" if _LICENCE.fullmatch(name) else ""          # (the hub takes no other)
        return line, f"That of the teacher: {_code(name)}, as its {where} states."
    stated = f"The teacher's {where} states no licence" if path or is_folder else (
        f"That of the teacher, {_code(teacher)}, whose README.md was not at hand when this card was written")
    return "", f"{stated}; its terms, wherever stated,\napply to this model too."


def _code(text):
    """Text of others as a code span, also in a table: nothing in it is Markdown, and it stays in its line."""
    text = one_line(text, 300)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text[:1] == "`" or text[-1:] == "`" or not text.strip() else ""
    return f"{fence}{space}{text}{space}{fence}".replace("|", "\\|")


def _plain(text):
    """Text of others as plain text."""
    return re.sub(r"([\\`*_{}\[\]<>#|$~&!])", r"\\\1", one_line(text, 300))
