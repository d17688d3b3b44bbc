"""One job at a time in a run directory."""

import contextlib
import fcntl
import json
import os
import socket
import time
from pathlib import Path

from sidfast.errors import UserError

NAME = ".lock"
_held = {}                                               # a lock lives as long as its process


def claim(out, first, patience=45, warn=print):
    """Hold `out` for as long as this process lives; does nothing for a folder that is not there yet.

    The first process of a job takes the lock; the others wait until no other job holds it, so that none joins the
    processes of a job that is just ending. Raises UserError after `patience` seconds.
    """
    path = (Path(out) / NAME).resolve()
    if path in _held or not path.parent.is_dir():
        return
    lock, told, deadline = open(path, "a+", encoding="utf-8"), False, time.monotonic() + patience     # noqa: SIM115
    while not _take(lock, first) and not (not first and _is_ours(path)):
        if time.monotonic() > deadline:
            raise UserError(f"--out {out}: another job is training there ({_holder(path)}); end it first, or choose "
                            "another folder")
        if first and not told:
            warn(f"waiting for the job that still writes to {out} ({_holder(path)})")
            told = True
        time.sleep(0.1)
    if not first:
        lock.close()
        return
    _held[path] = lock
    holder = {"host": socket.gethostname(), "process": os.getpid(), "parent": os.getppid()}
    with contextlib.suppress(OSError):                   # on a full disk it is a lock all the same
        lock.truncate(0)
        os.write(lock.fileno(), json.dumps(holder).encode())         # (a buffer would try again as it is closed)


def _take(lock, first):
    """Whether the lock is free (and now ours, if we are the first process)."""
    try:
        fcntl.flock(lock, (fcntl.LOCK_EX if first else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:                                      # a file system without locks
        return True
    return True


def _is_ours(path):
    """Whether the holder was started by our own parent, or on another machine, which a job of our own may have been."""
    try:
        holder = json.loads(path.read_text())
        return holder["host"] != socket.gethostname() or holder["parent"] == os.getppid()
    except (OSError, ValueError, KeyError):
        return False


def _holder(path):
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['process']} on {holder['host']}"
    except (OSError, ValueError, KeyError):
        return "unknown"
