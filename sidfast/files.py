"""Files that are whole or absent, also after a power cut."""

import os


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
