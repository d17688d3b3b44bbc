r"""Prompts in a file, read by number: only their positions are in memory.

A line ends with \n, \r\n or \r. Other characters that end a line elsewhere (U+2028, U+0085, \v, \f) are white space
within a prompt. White space and zero-width characters at both ends of a line are removed, U+FEFF (a byte order mark)
among them, and a line without a visible character is not a prompt.
"""

import hashlib
import os
import threading
import unicodedata

import numpy as np

from sidfast.common.errors import RunError, UserError

LIMIT = 100_000                                          # bytes of a prompt
_CHUNK = 2**24
_TOGETHER = 1000                                         # lines
_ZERO_WIDTH = "\u200b\u200c\u200d\u200e\u200f\u2060\ufeff"
_EDGES = _ZERO_WIDTH + "".join(c for c in map(chr, range(0x3001)) if c.isspace())
_FILLERS = "\u115f\u1160\u2800\u3164\uffa0"              # letters and symbols that are drawn as nothing
_INVISIBLE = {"Cc", "Cf", "Zs", "Zl", "Zp", "Mn", "Me"}  # Unicode categories: controls, spaces, marks without a letter


class PromptsChanged(RunError):
    """A file of prompts that is no longer what it was when it was opened."""


def clean(text):
    """A line as a prompt; empty if nothing of it is visible."""
    text = text.strip(_EDGES)
    return text if any(unicodedata.category(c) not in _INVISIBLE and c not in _FILLERS for c in text) else ""


class Lines:
    """The prompts of a file in its order, as a sequence."""

    def __init__(self, spans, read):
        """`spans` [N, 2]: where each begins and ends in the bytes that `read(start, stop)` returns."""
        self._spans, self._read = spans, read

    def __len__(self):
        return len(self._spans)

    def __getitem__(self, i):
        return self._read(*map(int, self._spans[i])).decode("utf-8").strip(_EDGES)

    def __iter__(self):
        for first in range(0, len(self), _TOGETHER):     # (a thousand at once: many times as fast as one by one)
            spans = self._spans[first:first + _TOGETHER]
            data = self._read(int(spans[0, 0]), int(spans[-1, 1]))
            for start, stop in (spans - spans[0, 0]).tolist():
                yield data[start:stop].decode("utf-8").strip(_EDGES)


class WatchedFile:
    """An open file whose contents must stay the same.

    The descriptor is read, not a mapping of the file: a file that was cut off then raises PromptsChanged and not
    SIGBUS. Its times and size are compared after every read, and its contents once those differ: a file that was only
    touched, or replaced by an equal one, passes. One that was deleted is still there for its descriptor.
    """

    def __init__(self, path, label):
        """Raises OSError. `label` opens the messages."""
        self._path, self._label, self._lock = path, label, threading.Lock()
        self._file = open(path, "rb", buffering=0)       # noqa: SIM115 (open for as long as there are readers)
        self._seen, self._digest = self._state(), None

    def chunks(self):
        """The contents in pieces, to be read to the end once, before anything else."""
        digest = hashlib.sha256()
        for chunk in _chunks(self._file):
            digest.update(chunk)
            yield chunk
        self._digest = digest.digest()

    def read(self, start, stop):
        """Bytes `start` to `stop` - 1. Raises PromptsChanged."""
        try:
            data = os.pread(self._file.fileno(), stop - start, start)
            if self._state() != self._seen:              # (after the read, so that what was read is what was checked)
                self._compare()
        except OSError as error:
            raise PromptsChanged(f"{self._label} can no longer be read ({error.strerror})") from None
        return data

    def _state(self):
        """Everything that changes with the file, and with the file of its name."""
        try:
            named = os.stat(self._path)
        except FileNotFoundError:
            named = None
        return [s and (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)
                for s in (os.fstat(self._file.fileno()), named)]

    def _compare(self):
        with self._lock:                                 # (several threads read)
            state = self._state()
            if state == self._seen:
                return
            opened, named = state
            same = self._hash(os.dup(self._file.fileno())) == self._digest
            if same and named and named[:2] != opened[:2]:
                same = self._hash(os.open(self._path, os.O_RDONLY)) == self._digest
            if not same:
                raise PromptsChanged(f"{self._label} has changed since the run started")
            self._seen = state

    @staticmethod
    def _hash(descriptor):
        digest = hashlib.sha256()
        with open(descriptor, "rb", buffering=0) as file:
            file.seek(0)
            for chunk in _chunks(file):
                digest.update(chunk)
        return digest.digest()


def _chunks(file):
    return iter(lambda: file.read(_CHUNK), b"")


def find_lines(chunks, label):
    """The spans [N, 2] (int64) of the lines with a prompt in a text that comes in chunks of bytes.

    Raises UserError, which `label` opens, for text that is not UTF-8, a null character, and a line above LIMIT.
    """
    spans, rest, base, number, ended = [np.empty((0, 2), np.int64)], b"", 0, 1, False
    for chunk in _ended(chunks):
        text = rest + chunk
        cut = max(text.rfind(b"\n"), text.rfind(b"\r")) + 1
        whole, rest = text[:cut], text[cut:]
        number -= ended and whole.startswith(b"\n")      # the second half of \r\n
        spans.append(_spans(whole, label, number) + base)
        ended, number, base = whole.endswith(b"\r"), number + _ends(whole), base + cut
        if len(rest) > LIMIT:
            raise too_long(f"{label}, line {number}")
    return np.concatenate(spans)


def _ended(chunks):
    yield from chunks
    yield b"\n"


def _ends(text):
    return text.count(b"\n") + text.count(b"\r") - text.count(b"\r\n")


def _spans(text, label, number):
    """The spans of the prompts in whole lines, the first of which has a number."""
    _check(text, label, number)
    data = np.frombuffer(text, np.uint8)
    ends = np.flatnonzero((data == ord("\n")) | (data == ord("\r")))
    starts = np.concatenate([[0], ends + 1])[:len(ends)]
    long = np.flatnonzero(ends - starts > LIMIT)
    if len(long):
        raise too_long(f"{label}, line {number + _ends(text[:starts[long[0]]])}")
    starts, ends = starts[ends > starts], ends[ends > starts]
    kept, first = np.ones(len(starts), bool), data[starts]
    for i in np.flatnonzero((first <= ord(" ")) | (first > ord("~"))):       # others begin with a visible character
        kept[i] = bool(clean(text[starts[i]:ends[i]].decode("utf-8")))
    return np.stack([starts, ends], 1)[kept]


def _check(text, label, number):
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{label}, line {number + _ends(text[:error.start])}: not UTF-8") from None
    if b"\0" in text:
        raise UserError(f"{label}, line {number + _ends(text[:text.index(0)])}: has a null character; a text file in "
                        "UTF-8 is needed")


def too_long(place):
    """The UserError for a prompt above LIMIT."""
    return UserError(f"{place}: is longer than {LIMIT:,} bytes; give one prompt a line")
