"""Folders of images, and images brought to a size."""

import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as image_ops

from sidfast.errors import UserError
from sidfast.evaluation.features import hash_files

_ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_TORCH = {"bicubic": image_ops.InterpolationMode.BICUBIC, "bilinear": image_ops.InterpolationMode.BILINEAR}


class ImageFolder:
    """The images of a folder in the natural order of their names (2.png before 10.png), all of one size.

    Raises UserError for a folder without images, a broken one, and sizes that differ; `option` is how the messages call
    the folder.
    """

    def __init__(self, folder, option):
        self.folder, self.option = Path(folder), option
        self.files = image_files(self.folder)
        if not self.files:
            raise UserError(f"{option} {folder}: no image in it ({', '.join(sorted(_ENDINGS))})")
        self.size = self._size(self.files[0])
        for path in self.files:
            size = self._size(path)
            if size != self.size:
                raise UserError(f"{option} {folder}: {path.name} is {_times(size)} and {self.files[0].name} "
                                f"{_times(self.size)}; all must have one size")

    def __len__(self):
        return len(self.files)

    def __call__(self, start, stop):
        """Images number start to stop - 1, [N, 3, H, W], fp32 in [0, 1]. Raises UserError for a broken one."""
        return torch.stack([self._read(path) for path in self.files[start:stop]])

    def sha256(self, n=None):
        """Hash of the names and contents of the first n files, or of all."""
        return hash_files(self.files[:n], self.folder)

    def _size(self, path):
        try:
            with Image.open(path) as image:
                size, mode = (image.height, image.width), image.mode
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise self._broken(path, error) from None
        if mode.startswith(("I", "F")):                  # Pillow would cut them off at 255
            raise UserError(f"{self.option} {self.folder}: {path.name} has more than 8 bits a channel ({mode}); 8 are "
                            "needed")
        return size

    def _read(self, path):
        try:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:          # (SyntaxError: Pillow's word for a broken PNG)
            raise self._broken(path, error) from None
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255

    def _broken(self, path, error):
        reason = str(error).replace(str(path), path.name).splitlines()[0]
        return UserError(f"{self.option} {self.folder}: {path.name} is no image or a broken one ({reason})")


def image_files(folder):
    """The image files of a folder, in natural order."""
    files = [p for p in Path(folder).iterdir() if p.suffix.lower() in _ENDINGS and not p.name.startswith(".")]
    return sorted(files, key=lambda p: [int(t) if t.isdigit() else t for t in re.split(r"([0-9]+)", p.name)])


def sized(make, side=None, filter_name="bicubic", expected=None):
    """`make` with its images resized to side x side, antialiased, unless `side` is None.

    Raises UserError, when called, for images whose size is not `expected` (height, width).
    """

    def make_sized(start, stop):
        images = make(start, stop)
        if side and tuple(images.shape[-2:]) != (side, side):
            images = _resize(images.float(), side, filter_name).clamp(0, 1)
        if expected and tuple(images.shape[-2:]) != tuple(expected):
            raise UserError(f"size mismatch: the images are {_times(images.shape[-2:])}, those of the reference "
                            f"{_times(expected)} (--resize N resizes the images)")
        return images

    return make_sized


def _resize(images, side, filter_name):
    """Images [N, C, H, W] to side x side, antialiased, in fp32 without rounding to 8 bits in between."""
    if filter_name in _TORCH:
        return image_ops.resize(images, [side, side], _TORCH[filter_name], antialias=True)
    planes = [Image.fromarray(plane).resize((side, side), Image.Resampling.LANCZOS)       # (torch has no Lanczos)
              for plane in images.flatten(0, 1).cpu().numpy()]
    return torch.from_numpy(np.stack(planes)).to(images.device).unflatten(0, images.shape[:2])


def _times(size):
    return f"{size[1]} x {size[0]}"
