"""Numbers of the house: `python tests/count_house.py`. tests/test_layers.py holds the bounds.

Modules that know a family of teachers, imports that point up, files of training/, the longest function, lines.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLOORS = (("kernels", "common"), ("method",), ("config", "data", "accel"), ("teachers", "engines"),
          ("checkpoints", "monitoring", "publishing"), ("averages", "evaluation"), ("runs", "toy"), ("planning",),
          ("training",), ("train", "studies"), ("cli", "options"), ("__main__",))
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}
KNOW_FAMILIES = ("teachers", "accel")
# Of one family of teachers: its networks, its table of noise levels (Adam's betas are none), its kinds of prediction.
FAMILY = re.compile(r"UNet2DConditionModel|CLIPTextModel|DiscreteBetas|alphas_cumprod|beta_(?:schedule|start|end)"
                    r"|trained_betas|\bbetas\b|prediction_type|v_prediction|PREDICTION_TYPES")
ADAM = re.compile(r"""\[?["']betas["']\]?|betas=\(""")   # its momenta have the same name


def modules(*folders):
    """The Python files below folders of the checkout."""
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def place_of(path):
    """The folder of sidfast/, or the module at its top, that a file belongs to."""
    return path.relative_to(ROOT / "sidfast").parts[0].removesuffix(".py")


def imported(source):
    """The places of sidfast that a module imports from, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "sidfast":
            yield from [node.module.split(".")[1]] if "." in node.module else [name.name for name in node.names]
        elif isinstance(node, ast.Import):
            yield from [name.name.split(".")[1] for name in node.names if name.name.startswith("sidfast.")]


def ups(source, here):
    """The places above `here` that a module imports from."""
    return sorted({place for place in imported(source) if LEVEL.get(place, 0) > LEVEL.get(here, 0)})


def family_words(source):
    """What a module says of one family of teachers, [(line number, word)]."""
    return [(number, match[0]) for number, line in enumerate(source.splitlines(), 1)
            for match in FAMILY.finditer(ADAM.sub("", line))]


def functions(path):
    """[(lines, name)] of the functions of a file."""
    return [(node.end_lineno - node.lineno + 1, node.name) for node in ast.walk(ast.parse(path.read_text("utf-8")))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def main():
    """Print the numbers."""
    package, text = modules("sidfast"), {path: path.read_text("utf-8") for path in modules("sidfast", "kernels")}
    knowing = {path: family_words(text[path]) for path in package if place_of(path) not in KNOW_FAMILIES}
    knowing = {path: words for path, words in knowing.items() if words}
    print(f"{len(knowing):6} modules outside {' and '.join(KNOW_FAMILIES)} know a family of teachers")
    for path, words in knowing.items():
        print(f"       {path.relative_to(ROOT)}: {', '.join(sorted({word for _, word in words}))}")
    arrows = [(path, place) for path in package for place in ups(text[path], place_of(path))]
    print(f"{len(arrows):6} imports point up")
    print(f"{len(modules('sidfast/training')):6} files in sidfast/training/")
    (lines, name), path = max((found, path) for path in text for found in functions(path))
    print(f"{lines:6} lines in the longest function, {name} of {path.relative_to(ROOT)}")
    print(f"{max(len(source.splitlines()) for source in text.values()):6} lines in the longest file")
    print(f"{sum(len(source.splitlines()) for source in text.values()):6} lines in sidfast/ and kernels/")


if __name__ == "__main__":
    main()
