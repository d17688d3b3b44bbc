"""What is measured, on which prompts, against which reference, through which networks: an evaluation but for its model.

`sidfast evaluate` and a training run build the same EvaluationSpec, so their numbers are the same numbers.
"""

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from sidfast.common.errors import UserError
from sidfast.common.extras import need
from sidfast.data import shapes
from sidfast.data.prompts import read_prompts
from sidfast.evaluation import metrics as numbers
from sidfast.evaluation.attributes import load_checker
from sidfast.evaluation.evaluate import held_out_captions
from sidfast.evaluation.features import INCEPTION_URL, load_clip, load_features
from sidfast.evaluation.images import sized
from sidfast.evaluation.judge import FeatureExtractors
from sidfast.evaluation.reference import drawn_reference, measure_reference, open_reference

HELD_OUT = "shapes:held_out"
_SHAPES_IMAGES = 10_000


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """The options of `sidfast evaluate` that say what is measured (docs/evaluation.md)."""

    prompts: str | None = None
    prompts_column: str | None = None
    reference: str | None = None
    images: int | None = None
    seeds_per_prompt: int = 1
    metrics: str | None = None
    features: str | None = None
    clip: str | None = None
    resize: int | None = None
    filter: str = "bicubic"
    assets: str = "assets"
    cache: Path = field(default_factory=lambda: Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
                        / "sidfast")

    @property
    def of_shapes(self):
        """Whether the prompts are captions of the shapes world, drawn by code."""
        return self.prompts == HELD_OUT

    def metric_set(self):
        """The metrics asked for, or those that are usual. Raises UserError for an unknown one."""
        usual = "fid,clip,accuracy" if self.of_shapes else "fid,clip"
        return numbers.parse_metrics(usual if self.metrics is None else self.metrics)


class EvaluationSpec:
    """Measures whose every part was found and checked. Raises UserError for whatever is at fault in them.

    `stored`: how many images there are, where they are not made but read from a folder; `tell(message)`: is given what
    the user should know of how the files were read.
    """

    def __init__(self, measures, device, stored=None, tell=None):
        self.measures, self.metrics = measures, measures.metric_set()
        for name in sorted(self.metrics & {"kid", "precision", "recall"}):
            need("torch_fidelity", "eval", f"--metrics {name}")
        if "diversity" in self.metrics and measures.seeds_per_prompt < 2:
            raise UserError("--metrics diversity: needs several images of each prompt; give --seeds-per-prompt 2")
        self.prompts = _prompts(measures, self.metrics, stored, tell)
        if "accuracy" in self.metrics:
            shapes.parse_captions(self.prompts)
        self.judge = _judge(measures, self.metrics, device)
        if self.judge.features:
            numbers.check_count(self.metrics, len(self.prompts), self.judge.features.dimension, "--images")
        self._reference, self._folder = self._open_reference(tell)

    def prompts_sha256(self):
        """Hash of the prompts of all images, or None if there are none."""
        if self.measures.prompts is None:
            return None
        return hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()

    def networks(self):
        """What the feature network and the CLIP are, wherever their files lie; None for one that is not needed."""
        return [network and network.describe() | {"weights": None}
                for network in (self.judge.features, self.judge.clip)]

    def sized(self, make):
        """`make` with its images brought to the size asked for, and checked against that of the reference."""
        size = self._reference.size if self._reference else None
        if size is None and self.measures.of_shapes:
            size = (shapes.IMAGE_SIZE,) * 2
        return sized(make, self.measures.resize, self.measures.filter, size)

    def measure_reference(self, group=None):
        """The Reference with its features, or None; a collective call of `group`. With None, those of the shapes world
        stay in memory."""
        if not self.judge.features:
            return None
        if self._reference is None:
            return drawn_reference(self.prompts, self.judge, group and self.measures.cache, group)
        return measure_reference(self._reference, self._folder, self.judge, self.measures.cache, group)

    def compute(self, rows, reference):
        """({metric: value}, {metric: (low, high)}) of what was measured on the images: see `metrics.compute` and
        `metrics.intervals`."""
        judge, k = self.judge, self.measures.seeds_per_prompt
        suffixes = judge.features and judge.features.suffix, judge.clip and judge.clip.suffix
        return numbers.compute(rows, self.metrics, reference, *suffixes, k), numbers.intervals(
            rows, self.metrics, suffixes[1], k)

    def names(self):
        """The names of the metrics in a result, in the order of `metrics.compute`."""
        return numbers.names(self.metrics, self.judge.features and self.judge.features.suffix,
                             self.judge.clip and self.judge.clip.suffix)

    def describe(self, reference):
        """What a result says of all this."""
        measures, judge, known = self.measures, self.judge, {}
        if judge.features:
            known = {"reference": reference.describe(), "features": judge.features.describe()}
        if judge.clip:
            known["clip"] = judge.clip.describe()
        resampling = {"side": measures.resize, "filter": f"{measures.filter}, antialiased"}
        return {"prompts": {"source": measures.prompts, "sha256": self.prompts_sha256()}, **known,
                "images": len(self.prompts), "resampling": resampling if measures.resize else None,
                "settings": numbers.settings(self.metrics, len(self.prompts), reference.images if reference else None)}

    def _open_reference(self, tell):
        measures = self.measures
        if not self.judge.features or (measures.of_shapes and measures.reference is None):
            return None, None
        if measures.reference is None:
            raise UserError(f"--reference: {', '.join(sorted(self.metrics & numbers.OF_FEATURES))} need the folder of "
                            "real images (or an .npz of their statistics) to compare with")
        reference, folder = open_reference(measures.reference, tell)
        numbers.check_reference(self.metrics, reference, folder)
        if reference.images:
            numbers.check_count(self.metrics, reference.images, self.judge.features.dimension, "--reference")
        return reference, folder


def _prompts(measures, metrics, stored, tell):
    """The prompt of each image, in order; `stored`: images of a folder, of which there is one for each, and of which no
    more can be asked."""
    k = measures.seeds_per_prompt
    if measures.prompts_column is not None and (measures.prompts is None or measures.of_shapes):
        raise UserError(f"--prompts-column {measures.prompts_column}: is of a table that --prompts names")
    if measures.of_shapes:
        images = measures.images or stored or _SHAPES_IMAGES
        prompts = held_out_captions(-(-images // k))
    elif measures.prompts:
        if measures.prompts.startswith("shapes:"):
            raise UserError(f"--prompts {measures.prompts}: the split for evaluations is {HELD_OUT}")
        prompts = read_prompts(measures.prompts, measures.prompts_column, tell)
        images = measures.images or len(prompts) * k
        if stored and stored != images and not measures.images:
            each = f" with {k} images each" if k > 1 else ""
            raise UserError(f"--model: the folder has {stored} images, {measures.prompts} has {len(prompts)} "
                            f"prompts{each}; the numbers must be the same (or give --images N to take the first N)")
    elif stored and not metrics & {"clip", "accuracy"}:
        images = measures.images or stored
        prompts = [""] * -(-images // k)
    else:
        raise UserError(f"--prompts: a text file, one prompt a line, is needed (or {HELD_OUT})")
    if images > len(prompts) * k:
        raise UserError(f"--prompts {measures.prompts}: {len(prompts)} prompts are too few for {images} images"
                        f"{f' with {k} seeds each' if k > 1 else ''}")
    if "diversity" in metrics and images % k:
        raise UserError(f"--images {images}: must be a multiple of --seeds-per-prompt ({k}) for diversity")
    if stored and images > stored:
        raise UserError(f"--model: {stored} images are in the folder, {images} are asked for")
    return [prompts[i // k] for i in range(images)]


def _judge(measures, metrics, device):
    small = f"{measures.assets}/clip" if measures.of_shapes else None
    features = clip = checker = None
    if metrics & numbers.OF_FEATURES:
        spec = measures.features or (f"clip:{small}" if small else None)
        if spec is None:
            raise UserError(f"--features: the feature network is missing; give inception:FILE (the weights are at "
                            f"{INCEPTION_URL}) or clip:FOLDER")
        features = load_features(spec, device)
    if metrics & {"clip", "diversity"}:
        folder = measures.clip or small
        if folder is None:
            raise UserError("--clip: the CLIP is missing; give the folder or hub id of one in transformers format")
        same = features and features.path == folder
        clip = features if same else load_clip(folder, device)
    if "accuracy" in metrics:
        checker = load_checker(Path(measures.assets) / "checker", device)
    return FeatureExtractors(features, clip, checker, "diversity" in metrics, device)
