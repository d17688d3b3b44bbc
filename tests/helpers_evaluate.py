"""The judge of the shapes world, from the networks in assets/, and the command run in this process."""

import functools
import json
from pathlib import Path

from sidfast import cli
from sidfast.evaluation.attributes import load_checker
from sidfast.evaluation.features import load_clip
from sidfast.evaluation.judge import FeatureExtractors

ASSETS = Path(__file__).parents[1] / "assets"


@functools.cache
def shapes_judge():
    """A Judge on the CPU with the small CLIP and the checker."""
    clip = load_clip(ASSETS / "clip", "cpu")
    return FeatureExtractors(clip, clip, load_checker(ASSETS / "checker"))


def arguments(values, out):
    """The command line of an evaluation with options {name: value}."""
    given = [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", value)]
    return ["evaluate", *given, "--out", str(out)]


def run(values, out):
    """The metrics that the command writes."""
    assert cli.main(arguments(values, out)) == 0
    return json.loads(out.read_text())
