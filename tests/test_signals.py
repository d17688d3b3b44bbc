"""What signals do to a run: it stops in order, at once, or not at all."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT, environment, wait_for_lines

from sidfast.monitoring import shutdown as stop_module
from sidfast.monitoring.shutdown import Stop

ANSWERS = {"saves": (True, False, "stopping after this step and saving; again: stop now without saving"),
           "nothing to save": (False, False, "stopping after this step; again: stop now"),
           "ending": (True, True, "the run is over and writes its last files; again: stop now")}


@pytest.mark.parametrize("saves, ending, words", ANSWERS.values(), ids=ANSWERS)
def test_control_c_is_answered_at_once(monkeypatch, capfd, saves, ending, words):
    """By the first process alone."""
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for rank in "01":
            monkeypatch.setenv("RANK", rank)
            monkeypatch.setenv("WORLD_SIZE", "2")
            with Stop() as stop:
                stop.saves, stop.ending = saves, ending
                signal.raise_signal(signal.SIGINT)
            assert capfd.readouterr().err == (f"\nsidfast: {words}\n" if rank == "0" else "")
    finally:
        signal.signal(signal.SIGINT, before)


def test_control_c_stops_in_order_and_a_second_one_at_once(monkeypatch):
    """But for one that comes with the first, as launchers pass it on; and after a SIGTERM as well."""
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)             # (ignored, if run in the background)
    try:
        with Stop() as stop:
            assert stop.should_stop() is None
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)          # (a launcher sends it after)
            assert stop.should_stop() == "SIGINT"
            signal.raise_signal(signal.SIGINT)
            monkeypatch.setattr(stop_module, "_SOON", 0)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("launched", [True, False])
def test_control_c_that_is_ignored(monkeypatch, launched):
    """As background jobs ignore it, which is right, and as `make train` lets its launcher, which ends at it."""
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(stop_module, "_tie_to_launcher", lambda: (psutil.Process(), os.getppid()) if launched else None)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Stop() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.should_stop() == ("SIGINT" if launched else None)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_control_c_in_make_train(write_config, tmp_path):
    """It reaches make, the shell, the launcher's two processes and training; one line tells what came of it."""
    venv, out = Path(sys.executable).parents[1], tmp_path / "run"
    config = write_config(**{"train.steps": 100_000, "train.save_every": 100_000, "evaluation.images": 0})
    process = subprocess.Popen(["make", "-o", f"{venv}/.ready", "train", f"VENV={venv}", f"CONFIG={config}",
                                f"ARGS=--out {out}"], cwd=ROOT, env=environment(29911), stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        wait_for_lines(out, 2, [process])
        os.killpg(process.pid, signal.SIGINT)
        said, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGINT and "Traceback" not in said, said
    assert re.search(rf"\nsidfast: stopped by SIGINT after step \d+; the last checkpoint is {out}/checkpoints/step-\d+"
                     r", the same command goes on from there\n", said), said


def test_signal_after_the_end_leaves_the_exit_code(tmp_path):
    """Up to the very last: Python gives its own handlers back before a process has ended."""
    script = tmp_path / "end.py"
    script.write_text("import os, subprocess\n"
                      "import torch\n"
                      "from sidfast.monitoring.shutdown import Stop\n"
                      "torch.distributed.get_world_size = lambda: 1\n"
                      "with Stop(last=True):\n"
                      "    pass\n"
                      "subprocess.Popen(['sh', '-c', f'while kill -TERM {os.getpid()}; do :; done'], stderr=-3)\n")
    assert subprocess.run([sys.executable, script], cwd=ROOT, env=environment(0)).returncode == 0
