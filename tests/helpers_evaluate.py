"""The judge of the shapes world, from the networks in assets/."""

import functools
from pathlib import Path

from sidfast.evaluation.attributes import load_checker
from sidfast.evaluation.features import load_clip
from sidfast.evaluation.judge import Judge

ASSETS = Path(__file__).parents[1] / "assets"


@functools.cache
def shapes_judge():
    """A Judge on the CPU with the small CLIP and the checker."""
    clip = load_clip(ASSETS / "clip", "cpu")
    return Judge(clip, clip, load_checker(ASSETS / "checker"))
