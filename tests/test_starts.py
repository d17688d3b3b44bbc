"""How a run gets its folder: two starts at once, refused starts, and file systems without locks."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Forked, environment, losses
from helpers_input import fails

from sidfast import train
from sidfast.common.errors import UserError, tell_once
from sidfast.common.files import drop_lock, take_lock
from sidfast.runs import lock
from sidfast.studies.record import reserved
from sidfast.studies.study import Run


@pytest.fixture(autouse=True)
def _locks_end_with_the_test():
    yield
    for path in list(lock._held):
        lock._held.pop(path).close()


def start(config, out, **more):
    return Forked("train", ["--config", config, "--out", out], 0, **more)


def test_two_starts_of_one_run_at_once(write_config, tmp_path):
    """In a folder that is not there yet: the second waits, then finds the run finished. Standard output is full."""
    config, out = write_config(**{"train.steps": 3, "evaluation.images": 0}), tmp_path / "new" / "run"
    both = [start(config, out, output="/dev/full") for _ in range(2)]
    told = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    first, second = sorted(told, key=lambda text: "resuming from" in text)
    assert "sidfast: starting, run directory" in first and "waiting" not in first
    assert f"waiting for the job that still writes to {out} (process " in second
    assert f"resuming from {out}/checkpoints/step-00000003" in second and "the run is already at step 3 of 3" in second
    assert [step for step, *_ in losses(out)] == [1, 2, 3]


def test_two_starts_of_different_runs_at_once(write_config, tmp_path):
    out, kappas = tmp_path / "run", (1.5, 3.0)
    configs = [write_config(f"{kappa}.json", **{"guidance.kappa4": kappa, "train.steps": 3, "evaluation.images": 0})
               for kappa in kappas]
    both = [start(config, out) for config in configs]
    told = [process.communicate()[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 2], told
    ours, theirs = kappas[codes.index(0)], kappas[codes.index(2)]
    assert (f"--out {out}: holds a run with another configuration (guidance.kappa4 is {ours} there and {theirs} here); "
            "choose another --out") in told[codes.index(2)]
    assert json.loads((out / "config.json").read_text())["config"]["guidance"]["kappa4"] == ours
    assert [step for step, *_ in losses(out)] == [1, 2, 3]
    assert (out / "checkpoints" / "latest").read_text() == "step-00000003\n"


def test_second_job_waits_then_says_who_is_there(tmp_path, capsys):
    script = ("import sys, time\nfrom sidfast.runs.lock import claimed\nwith claimed(sys.argv[1], True):\n"
              "    print('held', flush=True)\n    time.sleep(60)")
    holder = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        for first in (True, False):                      # (our parent is not the holder's)
            with pytest.raises(UserError, match=f"another job is training there .process {holder.pid} "), \
                    lock.claimed(tmp_path, first, patience=0.3):
                raise AssertionError
    finally:
        holder.kill()
        holder.wait()
    assert capsys.readouterr().err == f"sidfast: waiting for the job that still writes to {tmp_path} (process " \
                                      f"{holder.pid} on {socket.gethostname()})\n"
    with lock.claimed(tmp_path, True, patience=5):       # free once its holder is gone
        assert json.loads((tmp_path / lock.NAME).read_text())["process"] == os.getpid()
    lock._held.pop(tmp_path / lock.NAME).close()


@pytest.mark.parametrize("there", [None, "new", "new/run"])
def test_refused_start_leaves_no_folder(capsys, write_config, tmp_path, there):
    if there:
        (tmp_path / there).mkdir(parents=True)
    config, before = write_config(**{"noise.t_init": 999, "model.resolution": 9}), sorted(tmp_path.rglob("*"))
    assert "model.resolution (9)" in fails(capsys, train.main, "--config", config, "--out", tmp_path / "new" / "run")
    assert sorted(tmp_path.rglob("*")) == sorted({*before, config})


def test_folder_of_a_refused_start_is_not_taken_from_another(tmp_path):
    """Which uses it by now: with a lock, or a file, of its own."""
    out = tmp_path / "new" / "run"
    with pytest.raises(UserError), lock.claimed(out, True):
        (out / "notes").write_text("theirs")
        raise UserError
    assert [p.name for p in out.iterdir()] == ["notes"]


def test_a_start_interrupted_early_leaves_nothing_and_a_late_one_its_lock(tmp_path):
    for written in (False, True):
        with pytest.raises(KeyboardInterrupt), lock.claimed(tmp_path / "run", True):
            if written:
                (tmp_path / "run" / "config.json").write_text("{}")
            raise KeyboardInterrupt
        assert (tmp_path / "run" / lock.NAME).exists() == (tmp_path / "run").exists() == written
    assert take_lock(tmp_path / "run" / lock.NAME) is None           # threads may still be writing


def test_waiting_start_survives_that_the_other_is_refused(tmp_path):
    """The folder it waits in is removed; it makes it again."""
    out = tmp_path / "run"
    script = ("import sys, time\nfrom sidfast.common.errors import UserError\nfrom sidfast.runs.lock import claimed\n"
              "with claimed(sys.argv[1], True):\n    print('held', flush=True)\n    input()\n    raise UserError")
    holder = subprocess.Popen([sys.executable, "-c", script, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, text=True, cwd=tmp_path, env=environment(0))
    assert holder.stdout.readline() == "held\n"
    assert take_lock(out / lock.NAME) is None
    holder.communicate("now\n")
    assert not out.exists()
    with lock.claimed(out, True, patience=5):
        assert json.loads((out / lock.NAME).read_text())["process"] == os.getpid()


# ---- links

@pytest.mark.parametrize("plant", [os.symlink, os.link])
def test_lock_that_is_a_link(capsys, write_config, tmp_path, plant):
    victim, out = tmp_path / "victim", tmp_path / "run"
    victim.write_text("mine")
    out.mkdir()
    plant(victim, out / lock.NAME)
    line = fails(capsys, train.main, "--config", write_config(), "--out", out)
    assert line.startswith(f"sidfast: {out / lock.NAME}: ") and line.endswith("; remove it")
    assert victim.read_text() == "mine" and os.path.lexists(out / lock.NAME)


# ---- file systems without locks

@pytest.fixture
def no_locks(tmp_path, monkeypatch):
    """no_locks(error, everywhere): below tmp_path, or everywhere, there are no locks."""
    flock = fcntl.flock

    def set_up(error, everywhere=False):
        def refuse(file, how):
            if everywhere or Path(os.readlink(f"/proc/self/fd/{file.fileno()}")).is_relative_to(tmp_path / "disk"):
                raise OSError(error, os.strerror(error))
            flock(file, how)

        (tmp_path / "disk").mkdir()
        (tmp_path / "local").mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "local"))
        monkeypatch.setattr(fcntl, "flock", refuse)
        tell_once.cache_clear()
        return tmp_path / "disk"

    return set_up


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_file_system_without_locks(no_locks, capsys, error):
    """Processes of one machine see each other all the same; one line, once."""
    disk = no_locks(error)
    (disk / "same").symlink_to(disk)
    for name in ("result.json.lock", "other.lock"):
        held = take_lock(disk / name)
        assert held is not None and take_lock(disk / "same" / name) is None
        drop_lock(held)
        drop_lock(take_lock(disk / name))
    run = Run("a", 0, None)
    with reserved(disk, run) as first, reserved(disk, run) as second:
        assert (first, second) == (True, False)
    with lock.claimed(disk / "run", True), lock.claimed(disk / "run", False):
        assert (disk / "run").is_dir()
    assert capsys.readouterr().err == (f"sidfast: the file system has no locks ({os.strerror(error)}): a process on "
                                       "another machine that writes to the same folder is not noticed\n")


def test_no_locks_anywhere(no_locks, capsys):
    disk = no_locks(errno.ENOLCK, everywhere=True)
    with reserved(disk, Run("a", 0, None)) as mine, lock.claimed(disk / "run", True):
        assert mine
    assert capsys.readouterr().err.count("\n") == 1


# ---- standard output

SPEAKER = """
import sys
from sidfast.common.errors import say, tell, unfailing_streams
with unfailing_streams():
    with open(sys.argv[1], "w") as file:                 # a number that is free is the next file's
        say("é" * 10_000)
        say("the end")                                   # short enough for a buffer
        tell("a line")
"""


@pytest.mark.parametrize("redirection", [">/dev/full", ">&-", "| true", ">/dev/full 2>&1", "<&- >&- 2>&-", "| cat"])
def test_standard_output_that_takes_nothing(tmp_path, redirection):
    """A real process, up to the end of its interpreter, which flushes what is left. Its locale has no umlauts."""
    script = f'set -o pipefail; "$0" -c "$1" "$2" {redirection}'
    variables = environment(0) | {"PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": ""}
    done = subprocess.run(["bash", "-c", script, sys.executable, SPEAKER, tmp_path / "file"], cwd=tmp_path,
                          env=variables, capture_output=True, text=True)
    said = "" if "2>" in redirection else "sidfast: a line\n"
    assert (done.returncode, done.stderr) == (0, said)
    assert done.stdout == ("\\xe9" * 10_000 + "\nthe end\n" if redirection == "| cat" else "")
    assert (tmp_path / "file").read_text() == ""
