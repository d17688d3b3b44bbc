"""Prompts, addressed by a running number that never ends, so that any process can take any part at any time.

Prompt number n of a source depends on the source, the seed and n alone. A run therefore resumes exactly, and on any
number of processes, from the count of prompts that it has used.
"""

import contextlib
import functools
import gzip
import io
import itertools
import json
import zlib
from pathlib import Path

import numpy as np
import torch

from sidfast.common.errors import UserError
from sidfast.data import shapes
from sidfast.data.lines import LIMIT, Lines, WatchedFile, find_lines
from sidfast.data.tables import CAPTIONS, READERS, Table, prompt_of

_BLOCK = 1024
_LOOKED_AT = 10                                          # lines that tell a table from prompts
_KINDS = f"a text file, one prompt a line, or {', '.join(sorted(READERS))} (all of them also as .gz)"
_REFUSED = {
    ".7z", ".arrow", ".avro", ".bin", ".bmp", ".bz2", ".db", ".doc", ".docx", ".feather", ".gif", ".h5",
    ".hdf5", ".heic", ".htm", ".html", ".ipynb", ".jpeg", ".jpg", ".lmdb", ".mdb", ".npy", ".npz", ".ods",
    ".odt", ".orc", ".pdf", ".pickle", ".pkl", ".png", ".pt", ".pth", ".rar", ".rtf", ".safetensors",
    ".sqlite", ".sqlite3", ".tar", ".tgz", ".tfrecord", ".tif", ".tiff", ".toml", ".webp", ".xls", ".xlsx",
    ".xml", ".xz", ".yaml", ".yml", ".zip", ".zst"}


class PromptFile:
    """The prompts of a file; each epoch is a fresh permutation.

    Arguments and errors: as for `open_lines`. Indexing raises PromptsChanged (a RunError) for a text file that is no
    longer the same.
    """

    def __init__(self, path, seed=0, column=None, tell=None):
        self.seed, self._lines = seed, open_lines(path, column, "data.prompts", tell)

    def __len__(self):
        """Prompts in the file."""
        return len(self._lines)

    def __getitem__(self, n):
        epoch, position = divmod(n, len(self))
        return self._lines[self._order(epoch)[position]]

    @functools.lru_cache(maxsize=2)                      # noqa: B019 (one source lives as long as the run)
    def _order(self, epoch):
        return np.random.default_rng([self.seed, epoch]).permutation(len(self))


def open_lines(path, column=None, option="--prompts", tell=None):
    """The Lines of a file of prompts: of a text file only their positions are in memory, of a table or a .gz the
    prompts.

    `column`: of a table, its column of prompts; by default the one called caption, prompt, text or description.
    `option`: how messages call the file; `tell(message)`: is given what the user should know of a table. Raises
    UserError for a file that is missing, of another kind, damaged, not UTF-8, or without a prompt.
    """
    path, named = str(path), f"{option}{'-' if option.startswith('--') else '_'}column"
    label = f"{option}{'' if option.startswith('--') else ':'} {path[:200]}"
    if not path:
        raise UserError(f"{option} is empty; give {_KINDS}")
    path = Path(path)
    with _opening(path, label, column, named) as (ending, zipped):
        if ending in READERS:
            lines = _open_table(path, zipped, ending, Table(label, column, named), tell)
        else:
            lines = _open_zipped(path, label) if zipped else _open_text(path, label)
    if not len(lines):
        raise UserError(f"{label} holds {'no caption' if ending in READERS else 'empty lines only'}; it needs one "
                        f"prompt a {'row' if ending in READERS else 'line'}")
    if ending not in READERS:
        _check_text(lines, label)
    return lines


def read_captions(path, column=None, label=None, tell=None):
    """Each caption of a file of any size in turn, as a prompt (`prompt_of`) that is not checked; an empty one where
    there is none.

    `label`: opens messages; the other arguments, and UserError for a file that cannot be read: as for `open_lines`.
    """
    path, label = Path(path), label or str(path)
    with _opening(path, label, column, "--column") as (ending, zipped), (gzip.open if zipped else open)(
            path, "rb") as file:
        if ending in READERS:
            table = Table(label, column, "--column")
            rows = (text for _, text in table.captions(ending, file))
        else:
            rows = _text_lines(file)
        first = list(itertools.islice(rows, _LOOKED_AT))
        if ending in READERS:
            if tell and table.note():
                tell(table.note())
        elif seen := [text for text in first if text]:
            _check_text(seen, label)
        yield from first
        yield from rows


def is_readable(name):
    """Whether a file's name says that it has prompts."""
    return Path(name.lower().removesuffix(".gz")).suffix in (".txt", *READERS)


def _text_lines(file):
    """The lines of a text file as prompts. What is not UTF-8 becomes halves of characters, and a line that is too long
    comes cut off, but too long still."""
    text, whole = io.TextIOWrapper(file, "utf-8", errors="surrogateescape"), True
    while line := text.readline(LIMIT + 2):
        if whole:
            yield prompt_of(line)
        whole = line.endswith("\n")


@contextlib.contextmanager
def _opening(path, label, column, named):
    """(the ending of a file of prompts, whether it is compressed) for a block that reads it. Raises UserError for a
    file that is missing, empty, damaged, or of another kind; `named`: how the user names a `column`."""
    zipped = path.suffix.lower() == ".gz"
    ending = (path.with_suffix("") if zipped else path).suffix.lower()
    try:
        if not path.is_file():
            raise UserError(f"{label} is no file")
        if ending in _REFUSED:
            raise UserError(f"{label}: {ending} is not a kind of file that prompts are read from; give {_KINDS}")
        if path.stat().st_size == 0:
            raise UserError(f"{label} is empty; it needs one prompt a line")
        if ending not in READERS and column is not None:
            raise UserError(f"{named} {column}: {path.name} is a text file, which has no columns")
        yield ending, zipped
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{label}: is not a gzip file, or a damaged one ({error})") from None
    except OSError as error:
        raise UserError(f"{label} cannot be read ({error.strerror})") from None


def _check_text(lines, label):
    """Raise UserError for lines of a text file that are rows of a table."""
    if _is_json(lines[0]):
        raise UserError(f"{label}: its lines are JSON, not prompts; name it .jsonl, and their texts are read")
    table = _kind_of_table(lines)
    if table:
        raise UserError(f"{label}: its lines are rows of a table, not prompts; name it {table}, and its captions "
                        "are read")


def _kind_of_table(lines):
    """".csv" or ".tsv" for rows under a header of names, one of them of captions; None for prompts."""
    for ending, mark in ((".csv", ","), (".tsv", "\t")):
        names = [name.strip('"') for name in lines[0].split(mark)]
        header = len(names) > 1 and all(map(str.isidentifier, names)) and any(n.lower() in CAPTIONS for n in names)
        if header and all(mark in lines[i] for i in range(1, min(len(lines), _LOOKED_AT))):
            return ending
    return None


def _is_json(line):
    """Whether a line is a JSON object, as no prompt is."""
    try:
        return line.startswith("{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _open_text(path, label):
    file = WatchedFile(path, label)
    return Lines(find_lines(file.chunks(), label), file.read)


def _open_zipped(path, label):
    data = bytearray()

    def chunks():
        with gzip.open(path) as file:
            while chunk := file.read(2**24):
                data.extend(chunk)
                yield chunk

    return Lines(find_lines(chunks(), label), lambda start, stop: bytes(data[start:stop]))


def _open_table(path, zipped, ending, table, tell):
    with (gzip.open if zipped else open)(path, "rb") as file:
        lines = table.lines(ending, file)
    if tell and len(lines) and table.note():
        tell(table.note())
    return lines


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


def open_prompts(source, seed=0, column=None, tell=None):
    """A source of prompts by name: `shapes:SPLIT`, or the path of a file. Index it with any n >= 0.

    The other arguments and the errors: as for `open_lines`; UserError for an unknown split, too.
    """
    kind, _, split = source.partition(":")
    if kind != "shapes":
        return PromptFile(source, seed, column, tell)
    if column is not None:
        raise UserError(f"data.prompts_column ({column}) has no meaning for {source}, which is not a file")
    return ShapesPrompts(split, seed)


def read_prompts(path, column=None, tell=None):
    """All prompts of a file of --prompts in its order: a list. Arguments and errors: as for `open_lines`."""
    return list(open_lines(path, column, "--prompts", tell))
