"""One job at a time in a run directory."""

import contextlib
import json
import os
import socket
import time
from pathlib import Path

from sidfast.common.errors import UserError, tell
from sidfast.common.files import check_folder, drop_lock, is_locked, take_lock

NAME = ".lock"
_held = {}                                               # a lock lives as long as its process


@contextlib.contextmanager
def claimed(out, first, patience=45):
    """Inside the block no other job can use the run directory `out`: what to do there is decided in it, and done.

    The first process of a job makes the folder and holds its lock for as long as it lives. The others wait until no
    other job holds it, so that none joins the processes of a job that is just ending. If the block raises before
    anything was written, lock and folder are removed again. Raises UserError where nothing can be written, and after
    `patience` seconds.
    """
    out = Path(out)
    check_folder(out)
    path = out.resolve() / NAME                          # (the lock may not be a link)
    if not first:
        _wait(out, path, patience)
    if not first or path in _held:
        yield
        return
    made = _hold(out, path, patience)
    try:
        yield
    except BaseException as error:
        if isinstance(error, UserError) or not (out / "config.json").exists():       # (which every run writes first)
            _leave(path, made)
        raise


def is_claimed(out):
    """Whether a job is at work in the run directory `out`."""
    return is_locked(Path(out).resolve() / NAME)


def _hold(out, path, patience):
    """Take the lock, in a folder that is made for it. Returns the folders that were made, outermost first."""
    deadline, made, told = time.monotonic() + patience, [], False
    while True:
        try:
            made += _make(path.parent)
            lock = take_lock(path)
        except FileNotFoundError:                        # another start was refused and removed the folder just now
            continue
        except OSError as error:
            raise UserError(f"--out {out}: nothing can be written there ({error.strerror})") from None
        if lock is not None:
            break
        if time.monotonic() > deadline:
            raise _taken(out, path)
        if not told:
            tell(f"waiting for the job that still writes to {out} ({_holder(path)})")
            told = True
        time.sleep(0.1)
    _held[path] = lock
    holder = {"host": socket.gethostname(), "process": os.getpid(), "parent": os.getppid()}
    with contextlib.suppress(OSError):                   # on a full disk it is a lock all the same
        lock.truncate(0)
        os.write(lock.fileno(), json.dumps(holder).encode())         # (a buffer would try again as it is closed)
    return made


def _make(folder):
    missing = [place for place in (folder, *folder.parents) if not place.is_dir()][::-1]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _leave(path, made):
    drop_lock(_held.pop(path))
    for folder in reversed(made):
        with contextlib.suppress(OSError):               # (another start uses it)
            folder.rmdir()


def _wait(out, path, patience):
    """Until no other job holds the lock."""
    deadline = time.monotonic() + patience
    while is_locked(path) and not _is_ours(path):
        if time.monotonic() > deadline:
            raise _taken(out, path)
        time.sleep(0.1)


def _taken(out, path):
    return UserError(f"--out {out}: another job is training there ({_holder(path)}); end it first, or choose another "
                     "folder")


def _is_ours(path):
    """Whether the holder was started by our own parent, or on another machine, which a job of our own may have been."""
    try:
        holder = json.loads(path.read_text())
        return holder["host"] != socket.gethostname() or holder["parent"] == os.getppid()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _holder(path):
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['process']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"
