"""Files that are whole or absent, in folders that others can write to, and on file systems that cannot flush."""

import errno
import os
import stat
import time
from pathlib import Path

import pytest
import torch
from helpers_checkpoint import write_checkpoint
from PIL import Image

from sidfast.checkpoints import store as checkpoint
from sidfast.common import files
from sidfast.common.errors import tell_once
from sidfast.common.files import (
    recover_folder,
    remove,
    replacing,
    replacing_by_name,
    replacing_folder,
    sweep,
    temporary_folder,
    write_atomically,
)
from sidfast.evaluation.rows import FolderRows
from sidfast.publishing import export
from sidfast.runs.directory import RunDirectory

TOKEN = "0123456789abcdef"


@pytest.fixture
def victim(tmp_path):
    """A file and a folder with one, outside; checked to be as they were when the test ends."""
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "file").write_text("mine")
    yield tmp_path / "victim"
    assert [p.name for p in (tmp_path / "victim").iterdir()] == ["file"]
    assert (tmp_path / "victim" / "file").read_text() == "mine"


@pytest.mark.parametrize("content", ["text: é", b"\x00bytes"])
def test_a_file_is_replaced_as_a_whole(tmp_path, content):
    path = tmp_path / "file"
    for before in (None, "old"):
        write_atomically(path, content)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
        with pytest.raises(KeyboardInterrupt), replacing(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt
        assert path.exists() and b"half" not in path.read_bytes(), before
        assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    """With files in the mode of any new file; after a failure, and after a kill, the one before is still there."""
    folder = tmp_path / "folder"
    for content in ("first", "second"):
        with replacing_folder(folder) as new:
            (new / "part").mkdir()
            (new / "part" / "file").touch(mode=0o600)
            (new / "part" / "file").write_text(content)
        with pytest.raises(KeyboardInterrupt), replacing_folder(folder) as new:
            (new / "half").touch()
            raise KeyboardInterrupt
        (tmp_path / ".folder.partial").mkdir()           # of a process that was killed
        assert [str(p.relative_to(folder)) for p in sorted(folder.rglob("*"))] == ["part", "part/file"]
        assert (folder / "part" / "file").read_text() == content
        assert stat.S_IMODE((folder / "part" / "file").stat().st_mode) == 0o666 & ~_umask()
    recover_folder(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_file_written_by_its_name_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(OSError), replacing_by_name(path) as new:
        new.write_text("half")
        raise OSError
    assert path.read_text() == "old"
    with replacing_by_name(path) as new:
        new.touch(mode=0o600)
        new.write_text("new")
    assert path.read_text() == "new" and stat.S_IMODE(path.stat().st_mode) == 0o666 & ~_umask()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def _umask():
    before = os.umask(0)
    os.umask(before)
    return before


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_mode_of_a_new_file(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "file", "x")
        with temporary_folder(tmp_path) as folder:
            assert stat.S_IMODE(folder.stat().st_mode) == mode | (mode & 0o444) >> 2
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_name_in_use_is_never_opened(tmp_path, victim, monkeypatch):
    """Even of one who knows the name beforehand."""
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: TOKEN)
    (tmp_path / f".sidfast-{TOKEN}.partial").symlink_to(victim / "file")
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "report.html", "page")
    with pytest.raises(FileExistsError), temporary_folder(tmp_path):
        raise AssertionError


def test_names_cannot_be_foreseen(tmp_path):
    with replacing(tmp_path / "x") as a, replacing(tmp_path / ("y" * 255)) as b:         # (of any length)
        names = {Path(file.name).name for file in (a, b)}
        assert {p.name for p in tmp_path.iterdir()} == names and len(names) == 2


def test_link_in_the_place_of_the_result_is_replaced(tmp_path, victim):
    (tmp_path / "card").symlink_to(victim / "file")
    write_atomically(tmp_path / "card", "new")
    assert not (tmp_path / "card").is_symlink() and (tmp_path / "card").read_text() == "new"


def test_left_over_files_are_swept(tmp_path, victim):
    old, new, mine = (tmp_path / name for name in (f".sidfast-{TOKEN}.partial", ".sidfast-1.partial", ".x.partial"))
    for path in (old, new, mine):
        path.write_text("x")
        os.utime(path, (time.time() - (0 if path == new else 7200),) * 2)
    sweep(tmp_path)
    assert not old.exists() and new.exists() and mine.exists()
    old.symlink_to(victim)
    sweep(tmp_path, age=0)
    assert not os.path.lexists(old) and not new.exists() and mine.exists()


def test_removal_stops_at_links(tmp_path, victim):
    (tmp_path / "folder").mkdir()
    for link in (tmp_path / "link", tmp_path / "folder" / "link"):
        link.symlink_to(victim)
    for name in ("link", "folder", "nothing"):
        remove(tmp_path / name)
        assert not os.path.lexists(tmp_path / name)


def test_links_in_the_place_of_folders(tmp_path, victim):
    """Of an export, a checkpoint, and an evaluation's blocks, while they are put together."""
    for name in (".export.partial", ".export.old", ".partial-step-00000007", ".old-step-00000007", ".r.json.partial"):
        (tmp_path / name).symlink_to(victim)
    export.recover_export(tmp_path / "export")
    assert not (tmp_path / "export").exists()
    checkpoint.sweep(tmp_path)
    write_checkpoint(tmp_path, 7, {"a": torch.ones(2)})
    (tmp_path / ".old-step-00000007").symlink_to(victim)
    checkpoint.discard(tmp_path / "step-00000007")
    rows = FolderRows(tmp_path / ".r.json.partial", {"key": 1})
    assert not rows.open()
    rows.put(0, {"a": torch.arange(3)})
    assert rows.count() == 3
    assert {p.name for p in tmp_path.iterdir()} == {"victim", ".r.json.partial", "latest"}


def test_names_of_earlier_releases_are_no_traps(tmp_path, victim):
    for name in (".config.json.partial", "samples/.step-00000003.png"):
        (tmp_path / "run" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "run" / name).symlink_to(victim / "file")
    write_atomically(tmp_path / "run" / "config.json", "{}")
    run = object.__new__(RunDirectory)
    run.out, run.lost, run._trackers = tmp_path / "run", [], ()
    picture = Image.new("RGB", (8, 8))
    picture.info["sidfast-grid"] = "{}"
    run.sample(3, picture)
    assert Image.open(tmp_path / "run" / "samples" / "step-00000003.png").size == (8, 8) and run.lost == []


@pytest.mark.parametrize("error", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
def test_file_system_that_cannot_flush_folders(tmp_path, monkeypatch, capsys, error):
    """Everything is written, and it is said once."""
    flush = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(error, os.strerror(error))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(files, "_exchange", lambda *_: False)                   # nor exchange two names
    tell_once.cache_clear()
    for step in (1, 2):
        write_atomically(tmp_path / "file", f"{step}")
        write_checkpoint(tmp_path / "checkpoints", step, {"a": torch.ones(2)})
        (tmp_path / "new").mkdir()
        files.replace_folder(tmp_path / "new", tmp_path / "export")
    assert (tmp_path / "file").read_text() == "2" and (tmp_path / "export").is_dir()
    assert checkpoint.checkpoint_fault(tmp_path / "checkpoints" / "step-00000002") is None
    assert capsys.readouterr().err == ("sidfast: the file system cannot flush files or folders "
                                       f"({os.strerror(error)}): a power cut may cost the newest files\n")


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_disk_that_fails_is_not_passed_over(tmp_path, monkeypatch, error):
    def fsync(_):
        raise OSError(error, os.strerror(error))

    write_atomically(tmp_path / "file", "old")
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=os.strerror(error)):
        write_atomically(tmp_path / "file", "new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file", "old")]
