"""Attribute accuracy: does an image of the shapes world show everything that its caption says?

The judge is a small convolutional network, trained on real drawings only (sharp, blurred and noisy), never on a
teacher's or student's images.
"""

import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from sidfast.common.errors import UserError
from sidfast.data import shapes
from sidfast.teachers.load import check_finite_weights

ATTRIBUTES = ("count", "layout", "background", "size", "color", "shape")
_CLASSES = {"count": shapes.MAX_OBJECTS, "layout": len(shapes.LAYOUTS), "background": len(shapes.BACKGROUNDS),
            "size": len(shapes.SIZES), "color": len(shapes.COLORS), "shape": len(shapes.SHAPES)}
_PER_OBJECT = ("size", "color", "shape")
_WEIGHTS = "model.safetensors"


class AttributeChecker(nn.Module):
    """Images [N, 3, 64, 64] in [-1, 1] -> logits of every attribute: [N, K], or [N, 3, K] for those of objects."""

    def __init__(self):
        super().__init__()
        widths, layers = (3, 32, 64, 96, 96), []
        for i, (c, d) in enumerate(itertools.pairwise(widths)):
            stride = 1 if i == 3 else 2
            layers += [nn.Conv2d(c, d, 3, stride, 1), nn.BatchNorm2d(d), nn.ReLU()]
            layers += [nn.Conv2d(d, d, 3, 1, 1), nn.BatchNorm2d(d), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.Conv2d(widths[-1], 24, 1), nn.Flatten(),
                                      nn.Linear(24 * (shapes.IMAGE_SIZE // 8) ** 2, 192), nn.ReLU())
        self.heads = nn.ModuleDict({
            name: nn.Linear(192, k * (shapes.MAX_OBJECTS if name in _PER_OBJECT else 1))
            for name, k in _CLASSES.items()})

    def forward(self, images):
        """{attribute: logits, fp32} of images."""
        h = self.features(images)
        logits = {name: head(h).float() for name, head in self.heads.items()}
        for name in _PER_OBJECT:
            logits[name] = logits[name].unflatten(1, (shapes.MAX_OBJECTS, -1))
        return logits


def checker_loss(logits, scenes):
    """Sum of the cross-entropies of all attributes; slots without an object do not count."""
    present = scenes.present.float()
    loss = 0.0
    for name in ATTRIBUTES:
        target = getattr(scenes, name)
        if name in _PER_OBJECT:
            each = F.cross_entropy(logits[name].flatten(0, 1), target.flatten(), reduction="none")
            loss = loss + (each * present.flatten()).sum() / present.sum()
        else:
            loss = loss + F.cross_entropy(logits[name], target)
    return loss


def correct(logits, scenes):
    """Which attributes are right: {name: [N] bool} for each attribute, and under "all" whether all of them are."""
    result = {}
    for name in ATTRIBUTES:
        hit = logits[name].argmax(-1) == getattr(scenes, name)
        result[name] = (hit | ~scenes.present).all(1) if name in _PER_OBJECT else hit
    result["all"] = torch.stack(list(result.values())).all(0)
    return result


def save_checker(checker, folder):
    """Write the checker's weights as fp16 safetensors into `folder`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    state = {k: v.half() if v.is_floating_point() else v for k, v in checker.state_dict().items()}
    save_file({k: v.cpu().contiguous() for k, v in state.items()}, Path(folder) / _WEIGHTS)


def load_checker(folder, device="cpu"):
    """The checker from `folder`, in fp32 and evaluation mode. Raises UserError if it is not there, or broken."""
    path = Path(folder) / _WEIGHTS
    if not path.is_file():
        raise UserError(f"no attribute checker in {folder} ({_WEIGHTS} is missing); `sidfast teacher` trains one")
    checker = AttributeChecker()
    try:
        checker.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError, OSError):
        raise UserError(f"{path}: is no checker of this version; `sidfast teacher` trains one") from None
    check_finite_weights(checker, path)
    return checker.to(device).eval().requires_grad_(False)
