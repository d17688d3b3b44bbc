"""From images to a CLIP's pixels, as the preprocessor_config.json next to its weights says."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torchvision.transforms.v2 import functional as image_ops

from sidfast.common.errors import UserError, first_reason

_FILTERS = {2: image_ops.InterpolationMode.BILINEAR, 3: image_ops.InterpolationMode.BICUBIC}   # numbers of Pillow
_UNSUPPORTED = ("do_pad", "do_thumbnail", "do_align_long_axis", "do_reduce_labels", "do_flip_channel_order")


@dataclass(frozen=True)
class Preprocessing:
    """Images [N, 3, H, W] in [0, 1] -> pixels [N, 3, side, side] for a CLIP.

    `resize`: an int for the shorter side, (height, width), or None; `crop`: the side of the square cut from the centre,
    or None; `filter`: Pillow's number of the resampling, always antialiased; `scale`: what an image in [0, 1] is
    multiplied by; `mean`, `std`: of each channel, after that.
    """

    side: int
    resize: int | tuple | None
    crop: int | None = None
    filter: int = 3
    scale: float = 1.0
    mean: tuple = (0.5, 0.5, 0.5)
    std: tuple = (0.5, 0.5, 0.5)

    def __call__(self, images):
        """The pixels of images. Raises UserError for images that they do not fit."""
        size = [self.resize] if isinstance(self.resize, int) else self.resize
        if size and not self._has_size(images):
            images = image_ops.resize(images, list(size), _FILTERS[self.filter], antialias=True).clamp(0, 1)
        if self.crop and min(images.shape[-2:]) >= self.crop:
            images = image_ops.center_crop(images, [self.crop] * 2)
        if tuple(images.shape[-2:]) != (self.side,) * 2:
            raise UserError(f"--clip: by its preprocessor_config.json these images become {images.shape[-1]} x "
                            f"{images.shape[-2]}, the network takes {self.side} x {self.side}")
        mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return ((images if self.scale == 1 else images * self.scale) - mean) / std

    def describe(self):
        """The settings as JSON values, for a result."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def _has_size(self, images):
        size = tuple(images.shape[-2:])
        return min(size) == self.resize if isinstance(self.resize, int) else size == self.resize


def read_preprocessing(folder, side, what):
    """The Preprocessing of a CLIP's folder, for a network of images of side x side.

    Raises UserError, which `what` opens, for settings that are not honoured here, or do not fit the network.
    """
    from transformers import CLIPImageProcessor

    place = f"{what}: {folder}/preprocessor_config.json"
    if not any((Path(folder) / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        raise UserError(f"{place} is missing; it says how images are resized and normalised for the network")
    try:
        written, _ = CLIPImageProcessor.get_image_processor_dict(folder)
        _check_kind(written)
        return _preprocessing(CLIPImageProcessor.from_pretrained(folder).to_dict(), side)
    except UserError as fault:
        raise UserError(f"{place}: {fault}") from None
    except Exception as error:                           # the library raises many kinds for a broken file
        raise UserError(f"{place}: cannot be used ({first_reason(error)})") from None


def _check_kind(values):
    kind = values.get("image_processor_type") or values.get("feature_extractor_type") or "CLIPImageProcessor"
    if not str(kind).startswith(("CLIPImageProcessor", "CLIPFeatureExtractor")):
        raise UserError(f"{kind} is not CLIP's image processor")


def _preprocessing(values, side):
    for name in _UNSUPPORTED:
        if values.get(name):
            raise UserError(f"{name} is not supported")
    resize = _resize(values["size"]) if values["do_resize"] else None
    crop = _crop(values["crop_size"]) if values["do_center_crop"] else None
    if (crop or (side if isinstance(resize, int | None) else resize)) not in (side, (side, side)):
        raise UserError(f"makes images of {crop or resize} pixels, the network takes {side} x {side}")
    if crop and resize and crop > (resize if isinstance(resize, int) else min(resize)):
        raise UserError(f"crop_size {crop} is larger than size {resize}, so that images would get a margin")
    filter_ = int(values["resample"])
    if resize and filter_ not in _FILTERS:
        raise UserError(f"resample {filter_} is not supported; 2 (bilinear) and 3 (bicubic) are")
    scale = 255.0 * (float(values["rescale_factor"]) if values["do_rescale"] else 1.0)
    mean, std = (values["image_mean"], values["image_std"]) if values["do_normalize"] else ((0.0,) * 3, (1.0,) * 3)
    mean, std = (tuple(float(v) for v in numbers) for numbers in (mean, std))
    finite = torch.tensor([*mean, *std, scale]).isfinite().all()
    if len(mean) != 3 or len(std) != 3 or not finite or min(std) <= 0 or scale <= 0:
        raise UserError("image_mean and image_std must be three finite numbers, std and rescale_factor above 0")
    return Preprocessing(side, resize, crop, filter_, 1.0 if abs(scale - 1) < 1e-6 else scale, mean, std)


def _resize(size):
    if set(size) == {"shortest_edge"}:
        return _whole(size["shortest_edge"], "size")
    if set(size) == {"height", "width"}:
        return _whole(size["height"], "size"), _whole(size["width"], "size")
    raise UserError(f"size {size} is not supported; a shortest_edge, or a height and a width, is")


def _crop(size):
    sides = {_whole(size[name], "crop_size") for name in ("height", "width")}
    if len(sides) != 1:
        raise UserError(f"crop_size {size} is not square")
    return sides.pop()


def _whole(value, name):
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 16384:
        raise UserError(f"{name} must be a whole number of pixels, not {value!r}")
    return value
