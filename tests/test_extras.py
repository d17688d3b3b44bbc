"""What is installed when: training imports the dependencies alone, and a command that needs an extra says which."""

import ast
import json
import re
import sys

import pytest
import torch
import torchmetrics.image.fid  # noqa: F401 (looks for optional libraries as it is loaded)
from conftest import ROOT
from helpers_input import fails
from helpers_training import train_here
from PIL import Image

from sidfast import cli
from sidfast.accel.attention import choose_attention

try:
    import tomllib
except ImportError:                                      # Python 3.10
    import pip._vendor.tomli as tomllib
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
MODULES = {"pillow": "PIL", "torch-fidelity": "torch_fidelity"}      # distributions that are called otherwise in Python
BY_OTHERS = {"pydantic_core": "pydantic"}                # comes with it, in the version that fits
SOURCES = [*(ROOT / "sidfast").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]


def modules(requirements):
    """The modules that a list of requirements brings."""
    names = [re.match(r"[\w-]+", requirement)[0] for requirement in requirements]
    return {MODULES.get(name, name) for name in names}


def imports(path):
    """(Those at the top of a module, those inside functions and through `need`) of other libraries."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top, all_names = set(), set()
    for node in ast.walk(tree):
        names = ([alias.name for alias in node.names] if isinstance(node, ast.Import) else
                 [node.module] if isinstance(node, ast.ImportFrom) and not node.level else
                 [node.args[0].value] if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "need"
                 and isinstance(node.args[0], ast.Constant) else [])
        names = {"tensorboard" if name == "torch.utils.tensorboard" else name.split(".")[0] for name in names}
        names = {BY_OTHERS.get(name, name) for name in names} - sys.stdlib_module_names - {"sidfast"}
        all_names |= names
        top |= names if node in tree.body else set()
    return top, all_names - top


def hide(monkeypatch, *names):
    """Let imports of these libraries fail as if they were not installed."""
    for name in [*names, *(loaded for loaded in sys.modules if loaded.split(".")[0] in names)]:
        monkeypatch.setitem(sys.modules, name, None)


def test_every_dependency_is_imported_and_every_import_depends():
    """At the top of modules only what is always installed; inside functions also what an extra brings."""
    top, inside = (set.union(*sets) for sets in zip(*map(imports, SOURCES), strict=True))
    always = modules(PROJECT["dependencies"])
    for_commands = modules(r for name, extra in EXTRAS.items() if name not in ("bench", "dev") for r in extra)
    assert top - always == set()
    assert inside - always - for_commands == set()
    assert (always | for_commands) - top - inside == set()


def test_ceilings_where_private_parts_are_used():
    for name in ("torch", "deepspeed"):
        assert [r for r in PROJECT["dependencies"] if re.match(rf"{name}>=[\d.]+,<[\d.]+$", r)], name


def test_training_without_any_extra(write_config, tmp_path, monkeypatch, capsys):
    """Samples, evaluation and export; the report cannot be made, and a line says so."""
    config = write_config(**{"train.steps": 1, "train.samples": 2, "evaluation.images": 130, "evaluation.resize": 64,
                             "evaluation.metrics": "fid,clip,accuracy"})
    monkeypatch.setattr("diffusers.utils.import_utils._scipy_available", False)        # (looks for distributions)
    hide(monkeypatch, *modules(r for extra in EXTRAS.values() for r in extra) - {"pytest", "sidfast"})
    monkeypatch.chdir(ROOT)
    train_here(config, tmp_path / "run")
    told = capsys.readouterr().err
    assert "xformers" not in told and "Traceback" not in told
    assert "the report is not written: report.html needs" in told and "pip install 'sidfast[report]'" in told
    numbers = json.loads((tmp_path / "run" / "evaluation.json").read_text())["end"]
    assert numbers["images"] == 130 and {"accuracy", "clip_score", "fid_small_clip"} <= numbers.keys()
    assert (tmp_path / "run" / "export" / "model_index.json").is_file()
    assert len(list((tmp_path / "run" / "samples").iterdir())) == 2


def places(tmp_path):
    """Files that commands are given; none of them gets far enough to look into all."""
    result = {"model": {"path": "m", "steps": 1, "guidance": None}, "images": 9, "prompts": {"sha256": "a"},
              "reference": {"sha256": "b"}, "metrics": {"clip_score": 0.3, "fid": 9.0}}
    (tmp_path / "result.json").write_text(json.dumps(result))
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    (tmp_path / "inception.pth").write_bytes(b"")
    (tmp_path / "images").mkdir()
    for i in range(2):
        Image.new("RGB", (64, 64)).save(tmp_path / "images" / f"{i}.png")


EVALUATE = ("evaluate", "--model", "images", "--out", "out.json")


@pytest.mark.parametrize("library, extra, command", [
    ("gradio", "demo", ["demo", "--model", "m"]),
    ("matplotlib", "report", ["compare", "result.json", "--out", "out"]),
    *((library, extra, ["ablate", "study.json", "--out", "out"])
      for library, extra in (("scipy", "eval"), ("jinja2", "report"), ("matplotlib", "report"))),
    ("scipy", "eval", [*EVALUATE, "--prompts", "shapes:held_out", "--seeds", "2"]),
    *(("torch_fidelity", "eval", [*EVALUATE, "--prompts", "shapes:held_out", "--metrics", name])
      for name in ("kid", "precision", "recall")),
    ("torch_fidelity", "eval", [*EVALUATE, "--metrics", "fid", "--features", "inception:inception.pth"]),
    ("pyarrow", "parquet", [*EVALUATE, "--prompts", "p.parquet", "--metrics", "clip"])],
    ids=lambda value: value if isinstance(value, str) else value[0])
def test_a_command_says_which_extra_it_needs(tmp_path, monkeypatch, capsys, library, extra, command):
    places(tmp_path)
    monkeypatch.chdir(tmp_path)
    hide(monkeypatch, library)
    line = fails(capsys, cli.main, *command)
    assert f" needs {library}, which is not installed: pip install 'sidfast[{extra}]'" in line
    assert library in modules(EXTRAS[extra]) and not any(tmp_path.glob("out*"))


def test_report_needs_jinja2(tmp_path, monkeypatch, capsys):
    hide(monkeypatch, "jinja2")
    line = fails(capsys, cli.main, "report", "--run", tmp_path)
    assert line == "sidfast: report.html needs jinja2, which is not installed: pip install 'sidfast[report]'"


def test_attention_without_xformers(monkeypatch):
    """It is one candidate less, and the reason is kept."""
    hide(monkeypatch, "xformers")
    found = choose_attention([(1, 4, 4, 1, 8, 1)], torch.float32, torch.device("cpu"), ("xformers", "math"), repeat=1)
    assert list(found) == ["math", "xformers"] and isinstance(found["math"], float)
    assert found["xformers"] == "it needs xformers, which is not installed: pip install 'sidfast[xformers]'"


def test_a_broken_library_is_not_called_missing(monkeypatch):
    from sidfast.common.errors import UserError
    from sidfast.common.extras import need

    def broken(name):
        raise ImportError("libcudart.so.12: cannot open shared object file\nmore")

    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.raises(UserError, match=r"xformers, which cannot be imported \(libcudart.so.12: .* file\): pip"):
        need("xformers.ops", "xformers", "it")
