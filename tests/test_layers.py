"""Imports between the folders of sidfast/ point down, from a floor to those below it."""

import ast
import re

import pytest
from conftest import ROOT

FLOORS = (("kernels", "common"), ("method",), ("config", "data", "accel"), ("teachers", "engines"),
          ("checkpoints", "monitoring", "publishing"), ("evaluation",), ("runs", "toy"), ("planning",), ("training",),
          ("train", "studies"), ("cli",), ("__main__",))
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}
MODULES = [path.relative_to(ROOT / "sidfast") for path in sorted((ROOT / "sidfast").rglob("*.py"))]


def place_of(path):
    """The folder, or the module at the top, that a path belongs to."""
    return path.parts[0].removesuffix(".py")


def imported(source):
    """The places of sidfast that a module imports from, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "sidfast":
            yield from [node.module.split(".")[1]] if "." in node.module else [name.name for name in node.names]
        elif isinstance(node, ast.Import):
            yield from [name.name.split(".")[1] for name in node.names if name.name.startswith("sidfast.")]


def ups(source, here):
    """The places above `here` that a module imports from."""
    return sorted({place for place in imported(source) if LEVEL[place] > LEVEL[here]})


def test_every_folder_has_a_floor():
    assert {place_of(path) for path in MODULES} - {"__init__", "kernels"} == LEVEL.keys() - {"kernels"}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_down(path):
    if place_of(path) != "__init__":
        assert ups((ROOT / "sidfast" / path).read_text(encoding="utf-8"), place_of(path)) == []


@pytest.mark.parametrize("line", ["from sidfast.training import loop", "from sidfast import cli",
                                  "import sidfast.runs.lock", "def f():\n    from sidfast.planning.plan import plan"])
def test_an_import_that_points_up_is_seen(line):
    assert len(ups(line, "method")) == 1 and ups(line, "cli") == []


def test_the_paper_needs_the_kernels_alone():
    for path in (ROOT / "sidfast" / "method").glob("*.py"):
        assert set(imported(path.read_text(encoding="utf-8"))) <= {"kernels", "method", "common"}, path


def test_the_picture_of_the_floors():
    """docs/architecture.md shows them as they are, the highest first, and names files that exist."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^ *(\d+)  (.{36}) \S", page, re.MULTILINE)
    assert {int(level): tuple(names.split()) for level, names in rows} == dict(enumerate(FLOORS))
    assert [int(level) for level, _ in rows] == sorted(range(len(FLOORS)), reverse=True)
    for path in re.findall(r"`((?:sidfast|kernels)/[\w./]+)`", page):
        assert (ROOT / path).exists(), path
