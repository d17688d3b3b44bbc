"""What images are compared with: a folder of real images, its statistics, or the shapes world, drawn by code.

Features of a reference are kept in a cache under the hash of everything that they depend on, and computed once.
"""

import hashlib
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sidfast.common.errors import UserError
from sidfast.data import shapes
from sidfast.evaluation.images import ImageFolder
from sidfast.evaluation.processes import Group
from sidfast.evaluation.rows import FolderRows, MemoryRows, collect

_DRAWING_SEED = 20_000_003
_DRAWN_TOGETHER = 250                                    # fixed: the positions drawn depend on it
_READ_TOGETHER = 32
_TOLERANCE = 1e-3                                        # of the largest value, in a covariance


@dataclass
class Reference:
    """`rows` hold the features of `images` images; or they are None, and `statistics` are mean [D], covariance [D, D]
    in fp64. `size`: (height, width), where known."""

    source: str
    sha256: str
    images: int | None = None
    size: tuple | None = None
    rows: MemoryRows | None = None
    statistics: tuple | None = None

    def describe(self):
        """What a result says of it."""
        return {"source": self.source, "sha256": self.sha256, "images": self.images}


class _Drawing:
    """The true images of captions [N, 3, 64, 64] in [0, 1], at positions of their own seed: called with (start, stop)
    in rising order, for drawing moves the generator on."""

    def __init__(self, captions, device):
        self.captions, self.device, self.next = captions, device, 0
        self.generator = torch.Generator(device).manual_seed(_DRAWING_SEED)

    def __call__(self, start, stop):
        while self.next < stop:
            texts = self.captions[self.next:self.next + _DRAWN_TOGETHER]
            images = (shapes.draw(shapes.parse_captions(texts).to(self.device), self.generator) + 1) / 2
            self.next += len(texts)
        return images


def drawn_reference(captions, judge, cache=None, group=None):
    """The shapes world: real images of the same captions, so the captions agree and the positions do not."""
    text = json.dumps([captions, _DRAWING_SEED, _DRAWN_TOGETHER, torch.device(judge.device).type])
    reference = Reference("shapes world, drawn from the same captions", hashlib.sha256(text.encode()).hexdigest(),
                          len(captions), (shapes.IMAGE_SIZE,) * 2)
    return _with_rows(reference, _Drawing(captions, judge.device), _DRAWN_TOGETHER, judge, cache, group)


def open_reference(path, tell=None):
    """A Reference, still without features, from a folder of images, also in subfolders, or a file of statistics; and
    the ImageFolder. `tell(message)`: is given what was left out."""
    path = Path(path)
    if path.is_dir():
        folder = ImageFolder(path, "--reference", tell, nested=True)
        return Reference(str(path), folder.sha256(), len(folder), folder.size), folder
    if not path.is_file():
        raise UserError(f"--reference {path}: no such folder or file")
    mean, covariance = _read_statistics(path)
    return Reference(str(path), hashlib.sha256(path.read_bytes()).hexdigest(), statistics=(mean, covariance)), None


def measure_reference(reference, folder, judge, cache, group):
    """`open_reference`'s Reference with features, read from the cache or computed; a collective call."""
    if folder is None:
        if len(reference.statistics[0]) != judge.features.dimension:
            raise UserError(f"--reference {reference.source}: statistics of {len(reference.statistics[0])} features, "
                            f"the feature network has {judge.features.dimension}")
        return reference
    return _with_rows(reference, folder, _READ_TOGETHER, judge, cache, group)


def _with_rows(reference, make, batch_size, judge, cache, group):
    key = {"reference": reference.sha256, "features": judge.features.describe() | {"weights": None},
           "batch": batch_size, "products": torch.get_float32_matmul_precision()}
    if cache is None:
        rows = MemoryRows()
    else:
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        rows = FolderRows(Path(cache) / "reference" / name, key)
        (group or Group()).together(rows.open, first_only=True)
    collect(make, [None] * reference.images, judge.reference_rows, rows, batch_size, "reference", group)
    reference.rows = rows
    return reference


def _read_statistics(path):
    """(mean [D], covariance [D, D]) in fp64 from an .npz with `mu` and `sigma`, as pytorch-fid writes it."""
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no .npz")
        with np.load(path, allow_pickle=False) as file:
            mean, covariance = (_real(file[name], name) for name in ("mu", "sigma"))
        if mean.ndim != 1 or covariance.shape != (len(mean),) * 2:
            raise ValueError(f"mu is {tuple(mean.shape)} and sigma {tuple(covariance.shape)}")
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError("it has non-finite values")
        _check_covariance(covariance)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"--reference {path}: neither a folder of images nor statistics, an .npz with mu [D] and "
                        f"sigma [D, D] ({str(error).splitlines()[0]})") from None
    return mean, covariance


def _real(array, name):
    if np.iscomplexobj(array):
        raise ValueError(f"{name} is complex")
    return torch.from_numpy(array).double()


def _check_covariance(matrix):
    """Raise ValueError for what no features can have, to far more than the rounding of sums in fp32."""
    scale = matrix.abs().max()
    if scale == 0:
        return
    matrix = matrix / scale
    if (matrix - matrix.T).abs().max() > _TOLERANCE:
        raise ValueError("sigma is no covariance: it is not symmetric")
    values = torch.linalg.eigvalsh(matrix)               # in rising order
    if values[0] < -_TOLERANCE * values[-1].abs():
        raise ValueError(f"sigma is no covariance: it has negative eigenvalues ({values[0] * scale:.3g})")
