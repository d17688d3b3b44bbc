"""Files that are whole or absent, also after a power cut."""

import os
import tempfile
from pathlib import Path

from sidfast.errors import UserError, check_paths


def write_atomically(path, text):
    """Replace a text file as a whole, or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    write_text(partial, text)
    partial.replace(path)
    flush(path.parent)


def write_text(path, text):
    """Write a text file so that it survives a power cut."""
    with open(path, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def flush(path):
    """Make a file's or a folder's contents survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    try:
        tempfile.TemporaryFile(dir=folder).close()       # (os.access says that root may write to /proc)
    except OSError as error:
        raise UserError(f"{what}: nothing can be written to {folder} ({error.strerror})") from None
