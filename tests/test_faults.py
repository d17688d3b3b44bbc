"""What runs do about faults: stopped and stuck processes, gradients that are not finite, loss spikes, full disks."""

import errno
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, Forked, environment, fork_training, losses, process_alone, run_jobs
from helpers_checkpoint import EXTRA, KINDS, STATE
from tiny import NO_MIDDLE, write_tiny_teacher

from sidfast.config import Train
from sidfast.errors import RunError, UserError
from sidfast.publishing import export
from sidfast.train import Unfailing, join
from sidfast.training import checkpoint, lock
from sidfast.training import progress as progress_module
from sidfast.training import saver as saving
from sidfast.training.channel import Channel
from sidfast.training.progress import Progress
from sidfast.training.run import LineFile
from sidfast.training.saver import Saver
from sidfast.training.spikes import Spikes
from sidfast.training.state import file_name
from sidfast.training.stop import Stop
from sidfast.training.watch import judge


@contextmanager
def files_up_to(size):
    """No file may grow beyond `size` bytes: writing fails in the middle, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


# ---- hanging processes

def report(beat, count, place="step 3, log", patient=False):
    return {"beat": beat, "count": count, "place": place, "patient": patient}


def verdict(*rounds, timeout=10):
    """The last verdict after rounds of (time, {rank: report})."""
    seen = {}
    for now, reports in rounds:
        result = judge(seen, reports, now, timeout)
    return result


def test_a_process_that_never_spoke_is_silent():
    start = {"beat": 0, "count": 0, "place": "start", "patient": False}
    seen = dict.fromkeys(range(2), (start, 0.0, 0.0))
    for beat, now in enumerate((4.0, 8.0, 12.0), 1):
        found = judge(seen, {0: {"beat": beat, "count": 1, "place": "step 2", "patient": False}}, now, 10)
    assert found == ([1], "has not answered for 10 s", "start")
    assert judge(dict.fromkeys(range(2), (start, 0.0, 0.0)), {}, 12.0, 10) == (
        [0, 1], "have not answered for 10 s", "start")


def test_a_process_that_says_nothing_is_at_fault():
    ranks, what, place = verdict((0, {0: report(1, 5), 1: report(1, 4, "step 2, data")}),
                                 (11, {0: report(12, 5), 1: report(1, 4, "step 2, data")}))
    assert ranks == [1] and "10 s" in what and place == "step 2, data"


def test_a_process_that_fell_silent_ahead_of_the_others_is_at_fault():
    rounds = [(now, {0: report(now, 5), 1: report(min(now, 3), 6)}) for now in range(15)]
    assert verdict(*rounds[:13])[0] == []
    assert verdict(*rounds)[0] == [1]


def test_a_process_that_the_others_wait_for_is_at_fault():
    ranks, what, place = verdict((0, {0: report(1, 5), 1: report(1, 4, "step 2, data"), 2: report(1, 5)}),
                                 (11, {0: report(9, 5), 1: report(9, 4, "step 2, data"), 2: report(9, 5)}))
    assert ranks == [1] and "progress" in what and place == "step 2, data"


def test_no_process_is_at_fault():
    assert verdict((0, {0: report(1, 5), 1: report(1, 4)}), (11, {0: report(9, 6), 1: report(9, 4)}))[0] == []
    assert verdict((0, {0: report(1, 5), 1: report(1, 4)}), (9, {0: report(9, 5), 1: report(9, 4)}))[0] == []
    patient = {0: report(9, 5, "evaluation", patient=True), 1: report(9, 5)}
    assert verdict((0, {0: report(1, 5), 1: report(1, 5)}), (99, patient), (999, {
        rank: r | {"beat": 10} for rank, r in patient.items()}))[0] == []


def start_two(config, out, port, *args):
    """Two processes without a launcher."""
    command = [sys.executable, "sidfast/train.py", "--config", str(config), "--out", str(out), *args]
    return [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment(port) | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1"})
        for rank in range(2)]


def wait_for_lines(out, count, processes, timeout=300):
    deadline, path = time.monotonic() + timeout, out / "metrics.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert all(p.poll() is None for p in processes) and time.monotonic() < deadline
        time.sleep(0.05)


def test_collective_calls_wait_longer_than_the_watch(monkeypatch):
    """In the groups that DeepSpeed makes, too: else they would end a run while its first process measures, and before a
    process that hangs is named."""
    from deepspeed import comm
    from deepspeed.utils import groups
    from torch.distributed import distributed_c10d

    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):               # (both are put back afterwards)
        monkeypatch.setattr(distributed_c10d, name, getattr(distributed_c10d, name))
    process_alone(monkeypatch)
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "1")
    join()
    try:
        for group in (torch.distributed.group.WORLD, groups._clone_world_group(), torch.distributed.new_group()):
            timeout = group._get_backend(torch.device("cpu")).options._timeout
            assert timeout.total_seconds() > 100 * Train.model_fields["hang_timeout"].default
    finally:
        comm.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_stopped_process_is_named(write_config, tmp_path, rank):
    config = write_config(**{"train.steps": 10000, "train.hang_timeout": 30.0})
    processes = start_two(config, tmp_path / "run", 29902 + rank)
    try:
        wait_for_lines(tmp_path / "run", 2, processes)
        time.sleep(10)                                   # (they say where they are every 30 / 8 s, if not kept waiting)
        processes[rank].send_signal(signal.SIGSTOP)
        _, errors = processes[1 - rank].communicate(timeout=120)
    finally:
        for process in processes:
            process.kill()
    assert processes[1 - rank].returncode == 1
    assert re.search(rf"sidfast: process {rank} (has not answered for 30 s|does not answer); last seen at: step \d+, "
                     r".*\. The run ends; the last good checkpoint is none", errors), errors[-2000:]


# ---- gradients that are not finite

@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_non_finite_gradient_skips_the_update_everywhere(tmp_path, processes):
    teacher = write_tiny_teacher(tmp_path / "teacher", unet_blocks=NO_MIDDLE)
    out = tmp_path / "result.json"
    run_jobs({"teacher": str(teacher), "out": str(out)}, tmp_path, processes, 29904 + processes,
             script="tests/faulty_gradients.py")
    result = json.loads(out.read_text())
    assert len(result) == 16
    for case, everyone in result.items():
        for rows in everyone:
            assert rows == [[0, True, True], [1, False, True], [1, True, True], [1, True, True]], case


class NoSaver:
    folder = "/nowhere"

    def wait(self):
        pass


def test_too_many_skipped_updates_end_the_run():
    progress = Progress()
    for skipped in (1, 1, 0, 1, 1):
        progress.count_skipped("generator", skipped, 3, NoSaver())
    assert progress.skipped == 4 and progress.in_a_row == {"generator": 2, "fake_score": 0}
    with pytest.raises(RunError, match=r"last 3 updates of the generator .* The last good checkpoint is none"):
        progress.count_skipped("generator", 1, 3, NoSaver())


def test_run_without_a_finite_sample_ends(group, monkeypatch):
    monkeypatch.setattr(progress_module, "comm", torch.distributed)              # (DeepSpeed's has no group here)
    progress = Progress(step=7, logged=3, sums=[torch.tensor(0.0), torch.tensor(0.0), torch.tensor(2 * 4 * 4)])
    with pytest.raises(RunError, match=r"every sample of the last 4 steps was non-finite: .* at step 7\. The last good "
                                       "checkpoint is none; begin again with lower learning rates"):
        progress.reduce(4, NoSaver())


def test_diverged_run_names_its_last_good_checkpoint(write_config, tmp_path):
    config = write_config(**{"train.save_every": 1, "optimizer.generator.lr": 1e30})
    _, errors = (process := fork_training(config, tmp_path / "run", 29910)).communicate()
    assert process.returncode == 1
    assert ("sidfast: a network's output is not finite for any input: the run has diverged at step 2. The last good "
            f"checkpoint is {tmp_path}/run/checkpoints/step-00000001; go on from it (--resume PATH) with lower "
            "learning rates and another --out\n") in errors, errors[-2000:]


# ---- loss spikes

class Prompts:
    def prompt(self, step, update, row):
        return f"{update} {step} {row}"


def test_spikes_name_their_samples(group):
    spikes = Spikes(5.0, Prompts())
    t = torch.tensor([10, 20, 30])
    for step in range(30):
        usual = torch.tensor([1.0, -2.0, -2.0])
        high = torch.tensor([0.0, 90.0, 3.0]) if step == 25 else usual
        spikes.add(step, {"fake_score": (usual, t), "generator": (high, t)})
        if step == 14:
            assert spikes.take() == []
    found, = spikes.take()
    assert (found["step"], found["network"], found["loss"], found["median"]) == (25, "generator", 31.0, 1.0)
    assert found["samples"][0] == {"loss": 90.0, "t": 20, "prompt": "generator 25 1"}
    assert [s["t"] for s in found["samples"]] == [20, 30, 10]
    assert spikes.take() == []


# ---- checkpoints and files on a full disk

def save(saver, step, monkeypatch, size=1000):
    kinds, others = [file_name(*kind, 0, 1) for kind in KINDS], torch.ones(1)
    monkeypatch.setattr(checkpoint, "snapshot", lambda *_: {k: {"a": others if "ema" not in k else torch.ones(size)}
                                                            for k in kinds})
    monkeypatch.setattr(checkpoint, "engine_states", lambda _: STATE["engines"])
    saver.save(step, {}, None, EXTRA | {"step": step})
    return saver.wait()


def test_checkpoint_that_finds_no_room_costs_nothing_else(group, tmp_path, monkeypatch):
    told = []
    saver = Saver(tmp_path, 2, Channel(), 60, told.append)
    assert save(saver, 1, monkeypatch) is None
    with files_up_to(2000):
        fault = save(saver, 2, monkeypatch)
    assert str(tmp_path) in fault and "needs 3.92 KiB" in fault and "free)" in fault
    line, = told
    assert line.endswith(f"Training goes on; the last good checkpoint is {tmp_path / 'step-00000001'}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000001"]
    assert save(saver, 3, monkeypatch) is None and (tmp_path / "latest").read_text() == "step-00000003\n"


def test_pruning_spares_the_best_and_clears_away_what_was_damaged(group, tmp_path, monkeypatch):
    """Damaged checkpoints, newer than the one gone on from, make no good one go; they go once there is a new one."""
    saver = Saver(tmp_path, 2, Channel(), 60, print)
    for step in (1, 2):
        save(saver, step, monkeypatch)
    (tmp_path / "best").write_text("step-00000001\n")
    for damaged in (3, 9):
        shutil.copytree(tmp_path / "step-00000002", tmp_path / f"step-0000000{damaged}")
    saver = Saver(tmp_path, 2, Channel(), 60, print, begun=tmp_path / "step-00000002")
    assert len(list(tmp_path.glob("step-*"))) == 4
    for step, left in ((4, (1, 2, 4)), (5, (1, 4, 5))):
        assert save(saver, step, monkeypatch) is None
        assert sorted(p.name for p in tmp_path.glob("step-*")) == [f"step-0000000{n}" for n in left]


def test_what_killed_processes_left_is_removed(group, tmp_path):
    for name in (".partial-step-00000005", ".old-step-00000001", ".old-notes", "step-00000004"):
        (tmp_path / name).mkdir()
    Saver(tmp_path, 2, Channel(), 60, print)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".old-notes", "step-00000004"]


def test_foreign_folders_among_the_checkpoints_stay(group, tmp_path, monkeypatch):
    """Copies of checkpoints too; and a step of nine digits is newer than one of eight."""
    save(Saver(tmp_path, 1, Channel(), 60, print), 99_999_998, monkeypatch)
    foreign = ["step-notes", "step-99999998.bak", "step-7", "step-099999999", "step-", "step-file.txt", "step-99999999"]
    for name in foreign[:-2]:
        shutil.copytree(tmp_path / "step-99999998", tmp_path / name)
    for name in foreign[-2:]:
        (tmp_path / name).write_text("mine")
    saver, told = Saver(tmp_path, 1, Channel(), 60, print, begun=tmp_path / "step-99999998"), []
    saver.warn = told.append
    assert "Not a directory" in save(saver, 99_999_999, monkeypatch) and len(told) == 1      # what is in the way stays
    assert save(saver, 100_000_000, monkeypatch) is None and saver.saved == 100_000_000
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["latest", "step-100000000", *foreign])
    assert (tmp_path / "step-notes" / "state.json").is_file() and (tmp_path / "step-file.txt").read_text() == "mine"
    (tmp_path / "step-99999999").unlink()
    (tmp_path / "step-99999999").mkdir()
    assert [f.name for f in checkpoint.by_age(tmp_path)] == ["step-100000000", "step-99999999"]


@pytest.mark.parametrize("text", [b"step-123456789\n\xff\xfe\n", "step-123456789\r\n".encode("utf-16"),
                                  b"\xef\xbb\xbfstep-123456789"])
def test_best_in_any_encoding(group, tmp_path, monkeypatch, text):
    saver = Saver(tmp_path, 1, Channel(), 60, print)
    save(saver, 123456789, monkeypatch)
    (tmp_path / "best").write_bytes(text)
    for step in (123456790, 123456791):
        assert save(saver, step, monkeypatch) is None
    assert [f.name for f in checkpoint.by_age(tmp_path)] == ["step-123456791", "step-123456789"]


@pytest.mark.parametrize("error, words", [(MemoryError(), "MemoryError in"), (KeyError("x"), "KeyError ('x') in"),
                                          (RuntimeError("can't start new thread"), "(can't start new thread) in")])
@pytest.mark.parametrize("place", [(saving, "ThreadPoolExecutor"), (checkpoint, "complete")], ids=["write", "complete"])
def test_whatever_fails_while_saving_is_no_success(group, tmp_path, monkeypatch, error, words, place):
    told = []
    saver = Saver(tmp_path, 2, Channel(), 60, told.append)
    assert save(saver, 1, monkeypatch) is None
    with monkeypatch.context() as patch:
        patch.setattr(*place, Mock(side_effect=error))
        assert words in save(saver, 2, monkeypatch) and words in told[0] and len(told) == 1
    assert saver.saved == 1 and [f.name for f in checkpoint.by_age(tmp_path)] == ["step-00000001"]
    assert save(saver, 3, monkeypatch) is None and saver.saved == 3


@pytest.mark.parametrize("failing", ["00000-of", "00001-of", "complete", None])
def test_every_process_learns_the_outcome(group, tmp_path, monkeypatch, failing):
    """Two savers, of two ranks, in one process; what fails is a file of one of them, or the first one's last part."""
    store, write = torch.distributed.HashStore(), saving.save_file
    store.set_timeout(timedelta(seconds=20))

    def write_or_fail(tensors, path):
        if failing and failing in path.name:
            raise MemoryError
        write(tensors, path)

    monkeypatch.setattr(saving, "save_file", write_or_fail)
    monkeypatch.setattr(checkpoint, "engine_states", lambda _: STATE["engines"])
    if failing == "complete":
        monkeypatch.setattr(checkpoint, "complete", Mock(side_effect=MemoryError))
    savers = [Saver(tmp_path, 2, SimpleNamespace(rank=rank, ranks=2, connect=lambda _: store), 20, print)
              for rank in range(2)]
    for saver in savers:
        files = {file_name(*kind, saver.rank, 2): {"a": torch.ones(3)} for kind in KINDS}
        monkeypatch.setattr(checkpoint, "snapshot", lambda *_, files=files: files)
        saver.save(1, {}, None, EXTRA | {"step": 1})
    first, second = (saver.wait() for saver in savers)
    assert first == second
    if failing:
        assert first.startswith("MemoryError in ") and [saver.saved for saver in savers] == [None, None]
    else:
        assert first is None and checkpoint.checkpoint_fault(tmp_path / "step-00000001") is None


def test_lines_wait_for_room(tmp_path):
    file = LineFile(tmp_path / "m.jsonl", 0)
    file.write({"step": 1})
    with files_up_to(20), pytest.raises(OSError) as error:
        file.write({"step": 2, "long": "x" * 100})
    assert error.value.errno in (errno.EFBIG, errno.ENOSPC)
    assert (tmp_path / "m.jsonl").read_text() == '{"step": 1}\n'
    file.write({"step": 3})
    assert [json.loads(line)["step"] for line in (tmp_path / "m.jsonl").read_text().splitlines()] == [1, 2, 3]
    LineFile(tmp_path / "m.jsonl", 2)
    assert [json.loads(line)["step"] for line in (tmp_path / "m.jsonl").read_text().splitlines()] == [1, 2]


# ---- exports

def folder_with(path, text):
    path.mkdir()
    (path / "file").write_text(text)
    return path


@pytest.mark.parametrize("can_exchange", [True, False])
def test_export_takes_the_place_of_the_one_before(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(export, "_exchange", lambda *_: False)
    for text in ("first", "second"):
        export.replace_folder(folder_with(tmp_path / ".export.partial", text), tmp_path / "export")
        assert [p.name for p in tmp_path.iterdir()] == ["export"]
        assert (tmp_path / "export" / "file").read_text() == text


def test_export_comes_back_after_a_kill_between_two_renames(tmp_path):
    folder_with(tmp_path / ".export.old", "old")
    folder_with(tmp_path / ".export.partial", "half")
    export.recover_export(tmp_path / "export")
    assert [p.name for p in tmp_path.iterdir()] == ["export"] and (tmp_path / "export" / "file").read_text() == "old"


def test_log_on_a_full_disk_ends_nothing():
    full = io.TextIOWrapper(io.FileIO("/dev/full", "w"), write_through=True)
    print("a line", file=Unfailing(full), flush=True)
    with pytest.raises(OSError):
        print("a line", file=full, flush=True)


# ---- one job at a time

def test_second_job_waits_then_says_who_is_there(tmp_path):
    script = ("import sys, time; from sidfast.training.lock import claim; claim(sys.argv[1], True); "
              "print('held', flush=True); time.sleep(60)")
    holder = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE,
                              text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    told = []
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"another job is training there .process {holder.pid} "):
            lock.claim(tmp_path, True, patience=0.3, warn=told.append)
    finally:
        holder.kill()
        holder.wait()
    assert len(told) == 1 and "waiting" in told[0]
    lock.claim(tmp_path, True, patience=5)               # free once its holder is gone
    assert lock._held.pop((tmp_path / lock.NAME).resolve()).close() is None


def test_control_c_stops_in_order_and_a_second_one_at_once(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)             # (ignored, if run in the background)
    stop = Stop()
    try:
        assert stop.agreed() is None
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)              # (a launcher sends it after)
        assert stop.agreed() == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        stop.close()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_signal_after_the_end_leaves_the_exit_code(tmp_path):
    """Up to the very last: Python gives its own handlers back before a process has ended."""
    script = tmp_path / "end.py"
    script.write_text("import os, subprocess\n"
                      "import torch\n"
                      "from sidfast.training.stop import Stop\n"
                      "torch.distributed.get_world_size = lambda: 1\n"
                      "stop = Stop()\n"
                      "stop.ignore()\n"
                      "subprocess.Popen(['sh', '-c', f'while kill -TERM {os.getpid()}; do :; done'], stderr=-3)\n")
    assert subprocess.run([sys.executable, script], cwd=ROOT, env=environment(0)).returncode == 0


# ---- all of it together

def run_chaos(*args):
    done = Forked("tests/chaos.py", args, 0)
    code = done.wait(3000)
    text, errors = done.communicate()
    assert code == 0, text[-3000:] + errors[-3000:]
    return text


def test_a_little_chaos():
    text = run_chaos("--faults", "3", "--seed", "5", "--port", "29910", "--ranks", "2", "--kinds", "SIGTERM",
                     "kill during checkpoint", "disk full")
    assert re.search(r"\n3 faults in \d+ runs, \d+ s: all ended like the undisturbed one", text), text


@pytest.mark.slow
def test_much_chaos():
    assert "all ended like the undisturbed one" in run_chaos("--faults", "30", "--seed", "6", "--port", "29910")


@pytest.mark.slow
def test_two_processes_one_and_two_again(tiny_config, tmp_path):
    """A run that goes on with another number of processes, twice, follows the curve of one that was left alone."""
    def job(steps, out):
        return {"config": tiny_config | {"train": tiny_config["train"] | {"steps": steps, "save_every": 4}},
                "out": str(out)}

    run_jobs([job(12, tmp_path / "whole"), job(4, tmp_path / "run")], tmp_path, 2, 29915)
    run_jobs([job(8, tmp_path / "run")], tmp_path, 1, 29916)
    run_jobs([job(12, tmp_path / "run")], tmp_path, 2, 29917)
    want, got = losses(tmp_path / "whole"), losses(tmp_path / "run")
    assert [row[0] for row in got] == list(range(1, 13))
    worst = max(abs(a - b) / abs(b) for x, y in zip(got, want, strict=True) for a, b in zip(x[1:], y[1:], strict=True))
    print(f"largest relative difference of a loss: {worst:.1e}")
    assert worst < 1e-4
