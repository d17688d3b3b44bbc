"""Files that are whole or absent, also after a power cut."""

import fcntl
import os
import tempfile
from pathlib import Path

from sidfast.errors import UserError, check_paths


def write_atomically(path, text):
    """Replace a text file as a whole, or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        write_text(partial, text)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    flush(path.parent)


def write_text(path, text):
    """Write a text file so that it survives a power cut."""
    with open(path, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def check_file(out, suffix):
    """Raise UserError unless `out`, of a command's --out, has the suffix of its kind and is no folder, in one that is
    there."""
    if out.suffix.lower() != suffix:
        raise UserError(f"--out {out}: must end in {suffix}")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.parent} does not exist")
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; a file is needed")


def flush(path):
    """Make a file's or a folder's contents survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def take_lock(path):
    """The open file of a lock that is ours until `drop_lock`, or until this process ends, however it ends; None where
    another process has it. Raises OSError where the file cannot be made."""
    while True:
        file = open(path, "w")                           # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except BlockingIOError:
            file.close()
            return None
        except FileNotFoundError:
            pass
        except OSError:                                  # a file system without locks
            return file
        file.close()                                     # its last holder removed it just now


def drop_lock(file):
    """Give a lock of `take_lock` back, and remove its file."""
    Path(file.name).unlink(missing_ok=True)
    file.close()


def check_folder(path, option="--out"):
    """Raise UserError unless a folder is there and takes files, or can be made; nothing is left behind."""
    path, what = Path(path), f"{option} {path}"
    place = next((p for p in (path, *path.parents) if os.path.lexists(p)), Path())       # (the nearest that is there)
    if not os.path.isdir(place):
        raise UserError(f"{what}: is a file; a folder is needed" if path.is_file() else f"{what}: {place} is no folder")
    for name in path.parts[len(place.parts):]:
        check_paths({option: place / name})
    check_writable(place, what)


def check_writable(folder, what):
    """Raise UserError, which begins with `what`, unless a folder takes files: tried with one that has no name."""
    try:                                                 # (os.access says that root may write to /proc)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))                      # (a full disk takes empty files)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{what}: nothing can be written to {folder} ({error.strerror})") from None
