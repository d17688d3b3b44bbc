"""Files and folders that are whole or absent, also after a power cut; locks; and what commands check of an --out.

Temporary files and locks may lie in a folder that others can write to: none is ever opened through a link.
"""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import stat
import tempfile
import time
from pathlib import Path

from sidfast.common.errors import UserError, check_paths, tell_once

_PREFIX, _SUFFIX = ".sidfast-", ".partial"               # of temporary files
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
_LONG_AGO = 3600                                         # seconds; no write takes that long
_HERE, _RENAME_EXCHANGE = -100, 2                        # of Linux


@contextlib.contextmanager
def replacing(path, durable=True):
    """A new binary file that takes the place of `path` when the block ends, or is removed if the block raises.

    `durable`: after a power cut the old or the new contents are there as a whole.
    """
    path = Path(path)
    partial = _temporary_name(path.parent)
    file = open(partial, "xb", opener=open_no_link)      # noqa: SIM115
    try:
        with file:
            yield file
            if durable:
                file.flush()
                _sync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    if durable:
        flush(path.parent)


@contextlib.contextmanager
def replacing_by_name(path):
    """The same, durable, for writers that want a name: a path at which they write the file."""
    path = Path(path)
    with temporary_folder(path.parent) as folder:
        new = folder / path.name
        yield new
        _settle(folder)
        new.replace(path)
    flush(path.parent)


@contextlib.contextmanager
def replacing_folder(folder):
    """A new folder that takes the place of `folder` when the block ends, or is removed if the block raises.

    A kill leaves nothing half-written in that place; `recover_folder` then removes what it left next to it. Two
    processes at once would mix their files: see `locked`.
    """
    folder = Path(folder)
    recover_folder(folder)
    new = _partial(folder)
    try:
        new.mkdir(parents=True)
        yield new
        _settle(new)
        replace_folder(new, folder)
    except BaseException:
        remove(new)
        raise


def replace_folder(new, folder):
    """Put a finished folder in another's place, at one moment where the file system can exchange two names."""
    old = _old(folder)
    remove(old)
    if not folder.exists():
        new.rename(folder)
    elif _exchange(new, folder):
        new.rename(old)
    else:
        folder.rename(old)                               # between these two, `recover_folder` knows the way back
        new.rename(folder)
    flush(folder.parent)
    remove(old)


def recover_folder(folder):
    """Undo what a process that was killed inside `replacing_folder` left: nothing half-written, and the folder if there
    was one."""
    old = _old(folder)
    if old.is_dir() and not old.is_symlink() and not folder.exists():
        old.rename(folder)
    for left in (_partial(folder), old):
        remove(left)


def _partial(folder):
    return folder.with_name(f".{folder.name}.partial")


def _old(folder):
    return folder.with_name(f".{folder.name}.old")


def _exchange(a, b):
    """Exchange two names by Linux's renameat2; False where that is not possible."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    return call(_HERE, os.fsencode(a), _HERE, os.fsencode(b), _RENAME_EXCHANGE) == 0


def _settle(folder):
    """Make what is in a folder survive a power cut, its files in the mode of any new file (safetensors writes such as
    their owner alone can read)."""
    usual = _temporary_name(folder)
    usual.touch()
    for path in Path(folder).rglob("*"):
        if path != usual:
            if path.is_file():
                shutil.copymode(usual, path)
            flush(path)
    usual.unlink()


@contextlib.contextmanager
def temporary_folder(parent):
    """A new folder in `parent` for the block, for writers that want a path; what is still there then is removed."""
    folder = _temporary_name(parent)
    folder.mkdir()
    try:
        yield folder
    finally:
        remove(folder)


def _temporary_name(folder):
    return Path(folder) / f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}"


def write_atomically(path, content):
    """Replace a file of text (written as UTF-8) or bytes as a whole, or not at all."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sweep(folder, age=_LONG_AGO):
    """Remove temporary files and folders that killed processes left in a folder at least `age` seconds ago."""
    for left in Path(folder).glob(f"{_PREFIX}*{_SUFFIX}"):
        with contextlib.suppress(OSError):
            if time.time() - left.lstat().st_mtime >= age:
                remove(left)


def is_temporary(path):
    """Whether a path is named like a temporary file of this module."""
    return path.name.startswith(_PREFIX) and path.name.endswith(_SUFFIX)


def remove(path):
    """Remove what has this name, if anything has: a file, a folder with all in it, or a link, not what it points at.
    What cannot be removed stays."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.unlink(path)


def flush(path):
    """Make a file's or a folder's contents survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _sync(descriptor):
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        tell_once(f"the file system cannot flush files or folders ({os.strerror(error.errno)}): a power cut may cost "
                  "the newest files")


def open_no_link(path, flags):
    """An opener for `open` that refuses links (OSError)."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def take_lock(path):
    """The open file of a lock that is ours until `drop_lock`, or until this process ends, however it ends; None where
    another process has it.

    Where the file system has no locks, the lock is a file in this machine's temporary folder that stands for `path`,
    and a line on standard error says so. Raises OSError where the file cannot be made, UserError for a link.
    (The package filelock 4.3 takes hard links and pipes, gives up where there are no locks, and leaves the file.)
    """
    place = path
    while True:
        file = _open_lock(place)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(place)):
                return file
        except (BlockingIOError, PermissionError):       # (PermissionError: some network file systems)
            file.close()
            return None
        except FileNotFoundError:
            pass
        except OSError as error:
            if place != path:
                return file
            drop_lock(file)
            tell_once(f"the file system has no locks ({os.strerror(error.errno)}): a process on another machine that "
                      "writes to the same folder is not noticed")
            place = _stand_in(path)
            continue
        file.close()                                     # its last holder removed it just now


def _open_lock(path):
    try:
        file = open(path, "a+", encoding="utf-8", opener=open_no_link)          # noqa: SIM115
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{path}: is a link, where a lock has its file; remove it") from None
        raise
    about = os.fstat(file.fileno())
    if not stat.S_ISREG(about.st_mode) or about.st_nlink > 1:
        file.close()
        raise UserError(f"{path}: has a second name or is no file, where a lock has its file; remove it")
    return file


def _stand_in(path):
    """A file's name in this machine's temporary folder, the same for each path in every process of this user."""
    folder = Path(tempfile.gettempdir()) / f"sidfast-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise UserError(f"{folder}: belongs to someone else; set TMPDIR to a folder of your own")
    return folder / f"{hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()}.lock"


def drop_lock(file):
    """Give a lock of `take_lock` back, and remove its file."""
    Path(file.name).unlink(missing_ok=True)
    file.close()


@contextlib.contextmanager
def locked(path):
    """Whether this process alone has the lock at `path`, for the block (`take_lock`)."""
    lock = take_lock(path)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            drop_lock(lock)


def is_locked(path):
    """Whether a process has the lock at `path`. Never makes the file, nor keeps others from the lock."""
    place = path
    while True:
        try:
            with open(place, "rb", opener=open_no_link) as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
        except (BlockingIOError, PermissionError):
            return True
        except OSError as error:
            if isinstance(error, FileNotFoundError) or place != path:
                return False
            place = _stand_in(path)                      # (a file system without locks)


def check_file(out, suffix):
    """Raise UserError unless `out`, of a command's --out, has the suffix of its kind and is no folder, in one that is
    there."""
    if out.suffix.lower() != suffix:
        raise UserError(f"--out {out}: must end in {suffix}")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.parent} does not exist")
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; a file is needed")


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
            _sync(file.fileno())
    except OSError as error:
        raise UserError(f"{what}: nothing can be written to {folder} ({error.strerror})") from None
