"""What was measured on each image, block by block: {name: tensor [images of the block, ...]}.

Blocks are kept in memory, or in a folder from which an interrupted evaluation goes on and to which any number of
processes write. All sums are taken over the blocks in their order, so the numbers do not depend on who made them when.
"""

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from tqdm import tqdm

from sidfast.common.errors import UserError
from sidfast.common.files import remove, temporary_folder, write_atomically
from sidfast.evaluation.processes import Group

_KEY = "key.json"


class MemoryRows:
    """Blocks in memory."""

    folder = None

    def __init__(self):
        self._blocks = {}

    def __contains__(self, start):
        return start in self._blocks

    def put(self, start, rows):
        """Keep the block {name: [n, ...]} whose first image is number `start`."""
        self._blocks[start] = rows

    def blocks(self, name):
        """One tensor of each block, in order."""
        return (self._blocks[start][name] for start in sorted(self._blocks))

    def all(self, name):
        """One tensor of all images."""
        return torch.cat(list(self.blocks(name)))

    def count(self):
        """How many images there are rows of."""
        return sum(len(next(iter(rows.values()))) for rows in self._blocks.values())


class FolderRows(MemoryRows):
    """Blocks in a folder, each complete or absent, in safetensors; `key` (JSON) says what they belong to."""

    def __init__(self, folder, key):
        self.folder, self.key = Path(folder), json.loads(json.dumps(key))

    def open(self):
        """Make the folder ready; for one process. Returns False if it held blocks of something else, now gone.

        Raises UserError where it cannot be written.
        """
        try:
            return self._open()
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written ({error.strerror or error})") from None

    def _open(self):
        same = not os.path.lexists(self.folder) or self._is_ours()
        if not same:
            remove(self.folder)
        if not self.folder.exists():
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with temporary_folder(self.folder.parent) as new:
                (new / _KEY).write_text(json.dumps(self.key, indent=1))
                try:
                    new.rename(self.folder)              # with its key, or not at all
                except OSError:
                    if not self._is_ours():              # (ours: another process was faster, and made the same)
                        raise
        return same

    def _is_ours(self):
        try:
            return not self.folder.is_symlink() and json.loads((self.folder / _KEY).read_text()) == self.key
        except (OSError, ValueError):
            return False

    def __contains__(self, start):
        return self._path(start).is_file()

    def put(self, start, rows):
        """As MemoryRows's: a file, whole or absent. Raises OSError."""
        write_atomically(self._path(start), save({name: value.cpu().contiguous() for name, value in rows.items()}))

    def blocks(self, name):
        """As MemoryRows's, one file read at a time."""
        for path in sorted(self.folder.glob("block-*.safetensors")):
            with safe_open(path, "pt") as file:
                yield file.get_tensor(name)

    def count(self):
        """As MemoryRows's, from the files' heads."""
        total = 0
        for path in self.folder.glob("block-*.safetensors"):
            with safe_open(path, "pt") as file:
                total += file.get_slice(next(iter(file.keys()))).get_shape()[0]
        return total

    def _path(self, start):
        return self.folder / f"block-{start:08d}.safetensors"


def collect(make, prompts, measure, rows, batch_size, description, group=None):
    """Put into `rows` what they lack of `measure(images, prompts, first)`, a block of `batch_size` images at a time.

    `make(start, stop)` gives the images number `start` to `stop`, one for each prompt. A collective call of `group`,
    whose processes take the blocks in turn. Raises RuntimeError unless there are rows of every image in the end.
    """
    group = group or Group()

    def share():
        starts = range(0, len(prompts), batch_size)[group.rank::group.processes]
        for start in tqdm(starts, desc=description, mininterval=2, disable=group.rank > 0, unit="batch"):
            if start not in rows:
                part = prompts[start:start + batch_size]
                rows.put(start, measure(make(start, start + len(part)), part, start))

    group.together(share)
    if group.rank == 0 and rows.count() != len(prompts):
        raise RuntimeError(f"{description}: {len(prompts)} images were to be measured, and there are rows of "
                           f"{rows.count()} ({rows.folder or 'in memory'})")
