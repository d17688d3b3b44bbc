"""The wheel: what is in it, and that it works in an empty folder."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, environment
from helpers_input import fails

import sidfast
from sidfast import cli, train
from sidfast.common import shipped as places
from sidfast.common.shipped import find_config, shipped
from sidfast.config.schema import load_config
from sidfast.studies.study import read_study

FOLDERS = {"sidfast": "sidfast", "kernels": "sidfast/kernels", "assets": "sidfast/assets", "configs": "sidfast/configs"}
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The folder that an installed wheel would be."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-c", BUILD, str(out)], cwd=source, check=True, capture_output=True)
    with zipfile.ZipFile(next(out.glob("sidfast-*-py3-none-any.whl"))) as archive:
        archive.extractall(out / "site")
    return out / "site"


def test_every_file_of_the_package_is_in_the_wheel(wheel):
    files = {path.relative_to(wheel).as_posix() for path in wheel.rglob("*") if path.is_file()}
    wanted = {f"{there}/{path.relative_to(ROOT / here).as_posix()}" for here, there in FOLDERS.items()
              for path in (ROOT / here).rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    info = f"sidfast-{sidfast.__version__}.dist-info"
    assert {name for name in files if not name.startswith(info)} == wanted
    assert {"sidfast/py.typed", "sidfast/kernels/geglu.py", "sidfast/evaluation/templates/report.html"} <= wanted
    metadata = (wheel / info / "METADATA").read_text(encoding="utf-8")
    assert "License-Expression: Apache-2.0" in metadata and f"{info}/licenses/LICENSE" in files
    assert f"version: {sidfast.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def run(wheel, folder, *command):
    """Standard output of `python -m ...` in a folder, with the wheel in place of the checkout."""
    done = subprocess.run([sys.executable, "-m", *map(str, command)], cwd=folder, capture_output=True, text=True,
                          env=environment(0) | {"PYTHONPATH": str(wheel), "PYTHONDONTWRITEBYTECODE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_configuration_by_its_name_in_an_empty_folder(wheel, tmp_path):
    config = json.loads(run(wheel, tmp_path, "sidfast.train", "--config", "ddpm", "--dry-run"))
    assert config["model"]["teacher"] == str(wheel / "sidfast" / "assets" / "teacher")
    assert config["evaluation"]["assets"] == str(wheel / "sidfast" / "assets")


@pytest.mark.slow
def test_commands_in_an_empty_folder(wheel, tmp_path):
    run(wheel, tmp_path, "sidfast.train", "--config", "ddpm", "--set", "train.steps=4")
    run(wheel, tmp_path, "sidfast.cli", "sample", "--model", "runs/ddpm", "--prompt", "a small red circle on a white "
        "background", "--out", "grid.png")
    assert "images" in run(wheel, tmp_path, "sidfast.cli", "plan", "--config", "configs/ddpm.json")
    run(wheel, tmp_path, "sidfast.cli", "evaluate", "--model", "runs/ddpm", "--prompts", "shapes:held_out", "--images",
        "200", "--cache", "cache", "--out", "result.json")
    assert json.loads((tmp_path / "result.json").read_text())["images"] == 200
    assert (tmp_path / "grid.png").is_file() and (tmp_path / "runs" / "ddpm" / "report.html").is_file()


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_own_files_are_those_that_the_working_directory_lacks(elsewhere):
    assert shipped("assets/teacher") == str(ROOT / "assets" / "teacher") and shipped("./assets") == f"{ROOT}/./assets"
    for name in ("assets/none", "assets/../setup.py", "sidfast", "assets2", "/assets/teacher", "", "assets/\0"):
        assert shipped(name) == name
    Path("assets").mkdir()
    assert shipped("assets") == "assets" and shipped("assets/teacher") == str(ROOT / "assets" / "teacher")
    Path("assets/teacher").symlink_to("nowhere")         # (one that is broken is the user's too)
    assert shipped("assets/teacher") == "assets/teacher"


def test_a_configuration_by_path_or_name(elsewhere, capsys):
    own = f"{ROOT}/configs/ddpm.json"
    assert find_config("ddpm") == find_config("configs/ddpm.json") == own
    assert find_config("ablations/guidance") == f"{ROOT}/configs/ablations/guidance.json"
    assert find_config("ddpm.json") == "ddpm.json" and find_config("../ddpm") == "../ddpm"
    line = fails(capsys, train.main, "--config", "dppm")
    assert line.startswith("sidfast: dppm: no such file, and no configuration that comes with sidfast (ddpm, ddpm-")
    Path("ddpm").write_text("{}")
    assert find_config("ddpm") == "ddpm"


def test_own_assets_of_a_study_and_of_a_command(elsewhere, capsys):
    study = read_study("ablations/guidance")
    assert study.name == "guidance" and study.file.evaluation.assets == f"{ROOT}/assets"
    assert {(run.config.model.teacher, run.config.evaluation.assets) for run in study.runs} == {
        (f"{ROOT}/assets/teacher", f"{ROOT}/assets")}
    line = fails(capsys, cli.main, "sample", "--model", "assets/clip", "--prompt", "x", "--out", "x.png")
    assert f"--model {ROOT}/assets/clip: neither a run directory nor" in line


def test_the_checkout_itself_is_named_as_before(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config("configs/ddpm.json")
    assert (config.model.teacher, config.evaluation.assets) == ("assets/teacher", "assets")
    assert os.fspath(places.HOME) == os.fspath(ROOT)
