"""Prompts, addressed by a running number that never ends, so that any process can take any part at any time.

Prompt number n of a source depends on the source, the seed and n alone. A run therefore resumes exactly, and on any
number of processes, from the count of prompts that it has used.
"""

import codecs
import functools
from pathlib import Path

import numpy as np
import torch

from sidfast.data import shapes
from sidfast.errors import UserError

_BLOCK = 1024


class PromptFile:
    """A text file, one prompt a line, empty lines left out; each epoch is a fresh permutation.

    Only the offsets of the lines are kept in memory. Raises UserError for a file that is missing, empty, or not UTF-8.
    """

    def __init__(self, path, seed=0):
        if not path:
            raise UserError("data.prompts is empty; give a text file, one prompt a line")
        path = Path(path)
        try:
            if not path.is_file():
                raise UserError(f"data.prompts: {path} is no file")
            if path.stat().st_size == 0:
                raise UserError(f"data.prompts: {path} is empty; it needs one prompt a line")
            self.seed, self._bytes = seed, np.memmap(path, np.uint8, "r")
        except OSError as error:
            raise UserError(f"data.prompts: {str(path)[:200]} cannot be read ({error.strerror})") from None
        newlines = np.flatnonzero(self._bytes == ord("\n"))
        mark = 3 if bytes(self._bytes[:3]) == codecs.BOM_UTF8 else 0
        starts = np.concatenate([[mark], newlines + 1])
        ends = np.concatenate([newlines, [len(self._bytes)]])
        _check_utf8(path, self._bytes, starts)
        self._spans = np.stack([starts, ends], 1)[~_blank(self._bytes, starts, ends)]
        if not len(self._spans):
            raise UserError(f"data.prompts: {path} holds empty lines only; it needs one prompt a line")

    def __len__(self):
        """Prompts in the file."""
        return len(self._spans)

    def __getitem__(self, n):
        epoch, position = divmod(n, len(self))
        start, end = self._spans[self._order(epoch)[position]]
        return bytes(self._bytes[start:end]).decode("utf-8").strip()

    @functools.lru_cache(maxsize=2)                      # noqa: B019 (one source lives as long as the run)
    def _order(self, epoch):
        return np.random.default_rng([self.seed, epoch]).permutation(len(self))


def _blank(data, starts, ends):
    """[lines] bool: lines without a visible character. Only those that may begin with white space are decoded."""
    blank = starts == ends
    first = data[np.minimum(starts, len(data) - 1)]
    for i in np.flatnonzero(~blank & ((first <= ord(" ")) | (first >= 0x80))):
        blank[i] = not bytes(data[starts[i]:ends[i]]).decode("utf-8").strip()
    return blank


def _check_utf8(path, data, starts, chunk=2**24):
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(data), chunk):
        pending = len(decoder.getstate()[0])             # bytes of a character that the last chunk began
        try:
            decoder.decode(data[start:start + chunk].tobytes(), final=start + chunk >= len(data))
        except UnicodeDecodeError as error:
            line = np.searchsorted(starts, start - pending + error.start, side="right")
            raise UserError(f"data.prompts: {path}, line {line}: not UTF-8") from None


class ShapesPrompts:
    """Captions of the shapes world, of one split. Raises UserError for a split that is not one of SPLITS."""

    def __init__(self, split, seed=0):
        if split not in shapes.SPLITS:
            raise UserError(f"data.prompts: shapes:{split} is not one of "
                            f"{', '.join('shapes:' + s for s in shapes.SPLITS)}")
        self.split, self.seed = split, seed

    def __getitem__(self, n):
        block, position = divmod(n, _BLOCK)
        return self._captions(block)[position]

    @functools.lru_cache(maxsize=4)                      # noqa: B019
    def _captions(self, block):
        seed = np.random.SeedSequence([self.seed, block]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(seed >> np.uint64(1)))
        return shapes.captions(shapes.sample_scenes(_BLOCK, self.split, generator))


def open_prompts(source, seed=0):
    """A source of prompts by name: `shapes:SPLIT`, or the path of a text file. Index it with any n >= 0.

    Raises UserError for an unknown split, and for a file that is missing, empty, or not UTF-8.
    """
    kind, _, split = source.partition(":")
    return ShapesPrompts(split, seed) if kind == "shapes" else PromptFile(source, seed)


def read_prompts(path):
    """All prompts of a text file in its order, one a line, empty lines left out.

    Raises UserError for a file that is missing, not UTF-8, or without a prompt.
    """
    path = Path(path)
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"--prompts {path}: no such file") from None
    except UnicodeDecodeError:
        raise UserError(f"--prompts {path}: not UTF-8") from None
    except OSError as error:
        raise UserError(f"--prompts {path}: cannot be read ({error.strerror})") from None
    prompts = [line for line in lines if line]
    if not prompts:
        raise UserError(f"--prompts {path}: no prompt in it")
    return prompts
