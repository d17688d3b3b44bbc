"""Folders of images, and images brought to a size."""

import os
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as image_ops

from sidfast.common.errors import UserError
from sidfast.evaluation.features import hash_files

_ENDINGS = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_UNREAD = {".arw", ".avif", ".cr2", ".dds", ".dng", ".eps", ".exr", ".hdr", ".heic", ".heif", ".ico", ".j2k", ".jp2",
           ".jxl", ".nef", ".pbm", ".pgm", ".pnm", ".ppm", ".psd", ".raw", ".svg", ".tga"}
_TORCH = {"bicubic": image_ops.InterpolationMode.BICUBIC, "bilinear": image_ops.InterpolationMode.BILINEAR}


class ImageFolder:
    """The images of a folder in the natural order of their names (2.png before 10.png), all of one size.

    Raises UserError for a folder without images, a broken one, formats that are not read, and sizes that differ.
    """

    def __init__(self, folder, option, tell=None, nested=False):
        """`option`: how the messages call the folder; `tell(message)`: is given the names of what was left out;
        `nested`: whether images in subfolders count where the folder itself has none."""
        self.folder, self.option = Path(folder), option
        self.files, others = self._find(nested)
        if others and tell:
            tell(f"{option} {folder}: {_listed(others, folder)} left out, not images of this folder")
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

    def check_numbers(self, n):
        """Raise UserError if the first n images are numbered from 0 or 1 and a number is missing, or there twice: the
        images after it would belong to other prompts."""
        names = [re.fullmatch("(.*?)([0-9]+)", path.stem) for path in self.files[:n]]
        if not all(names) or len({name[1] for name in names}) > 1 or int(names[0][2]) > 1:
            return
        for number, (name, path) in enumerate(zip(names, self.files[:n], strict=True), int(names[0][2])):
            if int(name[2]) != number:
                raise UserError(f"{self.option} {self.folder}: {path.name} is where number {number} should be: images "
                                "are missing or there twice, and the prompts would belong to others. Complete the "
                                "folder, or rename the images")

    def _find(self, nested):
        """(The images in natural order, what else there is in the folder.)"""
        try:
            images, others, folders = _list(self.folder)
            if not images and folders:
                if not nested and any(has_images(path) for path in folders):
                    raise UserError(f"{self.option} {self.folder}: its images are in subfolders "
                                    f"({_listed(folders, self.folder)}); put them into one folder, in the order of the "
                                    "prompts")
                images, others = _walk(self.folder)
                folders = []
        except OSError as error:
            raise UserError(f"{self.option} {self.folder}: cannot be read ({error.strerror})") from None
        unread = [path for path in others if path.suffix.lower() in _UNREAD]
        if unread:
            raise UserError(f"{self.option} {self.folder}: {_listed(unread, self.folder)}: not a format that is read; "
                            f"convert to one of {', '.join(sorted(_ENDINGS))}")
        if not images:
            fault = ("neither a run directory, nor a diffusers pipeline, nor a folder of images"
                     if self.option == "--model" else "no image in it")
            raise UserError(f"{self.option} {self.folder}: {fault} ({', '.join(sorted(_ENDINGS))})")
        return images, others + folders

    def sha256(self, n=None):
        """Hash of the names and contents of the first n files, or of all."""
        return hash_files(self.files[:n], self.folder)

    def _size(self, path):
        try:
            with Image.open(path) as image:
                size, mode = (image.height, image.width), image.mode
                frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)   # (a camera's, with a preview)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise self._broken(path, error) from None
        if mode.startswith(("I", "F")):                  # Pillow would cut them off at 255
            raise UserError(f"{self.option} {self.folder}: {path.name} has more than 8 bits a channel ({mode}); 8 are "
                            "needed")
        if frames > 1:
            raise UserError(f"{self.option} {self.folder}: {path.name} has {frames} frames; one image is needed")
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


def has_images(folder):
    """Whether a folder itself has images."""
    return bool(_list(Path(folder))[0])


def _list(folder):
    """(Images, other files, folders) of a folder without those below it, each in natural order; hidden ones, whose
    names begin with a dot, are left out."""
    images, others, folders = [], [], []
    for path in sorted(folder.iterdir(), key=_natural):
        if not path.name.startswith("."):
            kind = folders if path.is_dir() else images if path.suffix.lower() in _ENDINGS else others
            kind.append(path)
    return images, others, folders


def _walk(folder):
    """(Images, other files) of a folder and all below it, each in natural order. Links are followed once."""
    images, others, waiting, seen = [], [], [folder], set()
    while waiting:
        place = waiting.pop()
        if os.path.realpath(place) not in seen:
            seen.add(os.path.realpath(place))
            found = _list(place)
            images += found[0]
            others += found[1]
            waiting += found[2]
    return (sorted(paths, key=lambda path: _natural(path.relative_to(folder))) for paths in (images, others))


def _natural(path):
    """A key that sorts names with numbers in them by the numbers. (Only 0 to 9: int() does not know every digit.)"""
    parts = re.split("([0-9]+)", str(path))
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], str(path)


def _listed(paths, folder):
    names = [str(path.relative_to(folder)) for path in paths]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} others" if len(names) > 5 else "")


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
