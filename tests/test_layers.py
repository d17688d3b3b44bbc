"""Imports between the folders of sidfast/ point down, from a floor to those below it; files and functions are short."""

import re

import pytest
from conftest import ROOT
from count_house import FLOORS, KNOW_FAMILIES, LEVEL, family_words, functions, imported, modules, place_of, ups

PACKAGE = modules("sidfast")


def name_of(path):
    return str(path.relative_to(ROOT))


def test_every_folder_has_a_floor():
    assert {place_of(path) for path in PACKAGE} - {"__init__", "kernels"} == LEVEL.keys() - {"kernels"}


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_imports_point_down(path):
    if place_of(path) != "__init__":
        assert ups(path.read_text(encoding="utf-8"), place_of(path)) == []


@pytest.mark.parametrize("line", ["from sidfast.training import loop", "from sidfast import cli",
                                  "import sidfast.runs.lock", "def f():\n    from sidfast.planning.plan import plan"])
def test_an_import_that_points_up_is_seen(line):
    assert len(ups(line, "method")) == 1 and ups(line, "cli") == []


def test_the_paper_needs_the_kernels_alone():
    for path in modules("sidfast/method"):
        assert set(imported(path.read_text(encoding="utf-8"))) <= {"kernels", "method", "common"}, path


@pytest.mark.parametrize("path", modules("sidfast", "kernels", "bench"), ids=name_of)
def test_files_and_functions_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350
    assert [found for found in functions(path) if found[0] > 60] == []


@pytest.mark.parametrize("path", [path for path in PACKAGE if place_of(path) not in KNOW_FAMILIES], ids=name_of)
def test_families_of_teachers_are_known_to_teachers_alone(path):
    assert family_words(path.read_text(encoding="utf-8")) == []


def test_few_files_in_training():
    assert len(modules("sidfast/training")) < 10


@pytest.mark.parametrize("line, words", [
    ("from diffusers import UNet2DConditionModel", ["UNet2DConditionModel"]), ("scheduler.config.prediction_type",
    ["prediction_type"]), ("betas = scheduler.alphas_cumprod", ["betas", "alphas_cumprod"]),
    ('both = {"betas": (0.0, 0.9)}', []), ("Adam(p, betas=(0, 1))", []), ('group["betas"][0]', [])])
def test_words_of_a_family_are_seen(line, words):
    assert [word for _, word in family_words(line)] == words


def test_the_picture_of_the_floors():
    """docs/architecture.md shows them as they are, the highest first, and names files that exist."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^ *(\d+)  (.{36}) \S", page, re.MULTILINE)
    assert {int(level): tuple(names.split()) for level, names in rows} == dict(enumerate(FLOORS))
    assert [int(level) for level, _ in rows] == sorted(range(len(FLOORS)), reverse=True)
    for path in re.findall(r"`((?:sidfast|kernels)/[\w./]+)`", page):
        assert (ROOT / path).exists(), path
