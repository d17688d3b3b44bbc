"""Checkpoints, exports and logs on a full disk, and what killed processes leave behind."""

import errno
import io
import json
import resource
import shutil
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from helpers_checkpoint import EXTRA, KINDS, STATE

from sidfast.checkpoints import saver as saving
from sidfast.checkpoints import store as checkpoint
from sidfast.checkpoints.format import file_name
from sidfast.checkpoints.saver import Saver
from sidfast.common import files
from sidfast.common.channel import Channel
from sidfast.common.errors import Unfailing
from sidfast.publishing import export
from sidfast.runs.directory import LineFile
from sidfast.training.progress import diverged


@contextmanager
def files_up_to(size):
    """No file may grow beyond `size` bytes: writing fails in the middle, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


# ---- checkpoints and files on a full disk

def save(saver, step, monkeypatch, size=1000, in_a_row=0):
    kinds, others = [file_name(*kind, 0, 1) for kind in KINDS], torch.ones(1)
    monkeypatch.setattr(checkpoint, "snapshot", lambda *_: {k: {"a": others if "ema" not in k else torch.ones(size)}
                                                            for k in kinds})
    monkeypatch.setattr(checkpoint, "engine_states", lambda _: STATE["engines"])
    saver.save(step, {}, None, EXTRA | {"step": step, "in_a_row": {"generator": in_a_row, "fake_score": 0}})
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


def test_link_in_the_place_of_a_checkpoint_that_is_begun(group, tmp_path, monkeypatch):
    victim, folder = tmp_path / "victim", tmp_path / "checkpoints"
    victim.mkdir()
    saver = Saver(folder, 2, Channel(), 60, print)
    folder.mkdir()
    (folder / ".partial-step-00000001").symlink_to(victim)
    assert save(saver, 1, monkeypatch) is None and list(victim.iterdir()) == []
    assert checkpoint.checkpoint_fault(folder / "step-00000001") is None and not (folder / "step-00000001").is_symlink()


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


def test_pruning_spares_the_last_one_before_updates_were_left_out(group, tmp_path, monkeypatch):
    """However many follow; a diverged run names it. Once updates are made again, it goes with the others."""
    saver = Saver(tmp_path, 2, Channel(), 60, print)
    for step, skipped, left in ((1, 0, "1"), (2, 0, "12"), (3, 1, "23"), (4, 6, "234"), (5, 11, "245"), (6, 16, "256")):
        assert save(saver, step, monkeypatch, in_a_row=skipped) is None
        assert [p.name[-1] for p in sorted(tmp_path.glob("step-*"))] == list(left)
    assert f"The last good checkpoint is {tmp_path}/step-00000002; go on" in str(diverged("x", 7, saver))
    assert saving.last_good(tmp_path).name == "step-00000006"
    assert save(saver, 7, monkeypatch) is None
    assert [p.name[-1] for p in sorted(tmp_path.glob("step-*"))] == ["6", "7"]


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
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    for text in ("first", "second"):
        files.replace_folder(folder_with(tmp_path / ".export.partial", text), tmp_path / "export")
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
