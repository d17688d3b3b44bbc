"""`--import MODULE`: densities and sources of the user's own, without a change to this package."""

import json

import pytest
from conftest import fork_training, free_port, losses
from helpers_input import fails

from sidfast import cli, train

MINE = """from dataclasses import dataclass

from sidfast.method.densities import Density
from sidfast.method.synthetic import Source


@dataclass(frozen=True)
class Narrow(Density, name="narrow"):
    def icdf(self, u):
        return u

    def cdf_range(self, low, high):
        return tuple(min(max(v, 0.0), 1.0) for v in (low, high))


class Mirrored(Source, name="mirrored"):
    def __call__(self, batch):
        return self.generate(batch).flip(-1)
"""


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path / "mine.py"


def test_a_run_with_a_density_and_a_source_of_its_own(capsys, write_config, tmp_path, mine, known_again):
    """Recorded; and without it, or with another, the run is not resumed."""
    config, out = write_config(**{"noise.density": "narrow", "synthetic.source": "mirrored", "train.steps": 2,
                                  "evaluation.images": 0}), tmp_path / "run"
    line = fails(capsys, train.main, "--config", config, "--out", out)
    assert "noise.density" in line and "'narrow'" in line and not out.exists()
    run = fork_training(config, out, free_port(), "--import", mine)
    assert run.wait() == 0, run.stderr.read()[-2000:]
    assert list(json.loads((out / "config.json").read_text())["imports"]) == ["mine"] and len(losses(out)) == 2

    command = "--config", config, "--out", out, "--set", "train.steps=3"
    mine.write_text(MINE + "# changed\n")
    assert "--import mine: is not what it was when the run in" in fails(
        capsys, train.main, *command, "--import", mine)
    assert f"--out {out}: that run began with --import mine; give it again" in fails(capsys, train.main, *command)
    assert cli.main(["plan", "--config", str(config), "--import", str(mine)]) == 0
    assert cli.main(["export", "--run", str(out), "--out", str(tmp_path / "e"), "--import", str(mine)]) == 0


@pytest.mark.parametrize("text, words", [
    ("import nothing_of_this_name", "(ModuleNotFoundError: No module named 'nothing_of_this_name')"),
    ("def", "(SyntaxError: invalid syntax (mine.py, line 1))"), ("raise SystemExit(0)", "(SystemExit: 0)"),
    ("raise ValueError", "(ValueError: no reason given)"), ("1 / 0", "(ZeroDivisionError: division by zero)"),
    (None, "(FileNotFoundError: ")], ids=["import", "syntax", "exit", "silent", "number", "missing"])
def test_a_module_that_cannot_be_imported(capsys, write_config, mine, text, words):
    mine.unlink() if text is None else mine.write_text(text)
    commands = (train.main, "--config", write_config()), (cli.main, "plan", "--config", write_config())
    for main, *command in commands:
        assert f"--import {mine}: cannot be imported {words}" in fails(capsys, main, *command, "--import", mine)


def test_a_module_by_its_name(capsys, write_config, monkeypatch, mine, known_again):
    monkeypatch.syspath_prepend(mine.parent)
    config = write_config(**{"noise.density": "narrow"})
    assert train.main(["--config", str(config), "--import", "mine", "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["noise"]["density"] == "narrow"
    assert "--import no.such: cannot be imported (ModuleNotFoundError" in fails(
        capsys, train.main, "--config", config, "--import", "no.such")
