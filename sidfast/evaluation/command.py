"""`sidfast evaluate`: from a model, prompts and a reference to a result file that says what it means.

An image depends on its seed and prompt alone. What was measured on each is saved beside the result while the
evaluation runs, so the same command goes on after an interruption and comes to the same numbers.
"""

import hashlib
import json
import os
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from sidfast.data import shapes
from sidfast.data.prompts import read_prompts
from sidfast.errors import UserError
from sidfast.evaluation import metrics as numbers
from sidfast.evaluation.attributes import load_checker
from sidfast.evaluation.coco import SIDE, caption_count, prepare_coco
from sidfast.evaluation.evaluate import held_out_captions, pipeline_generator
from sidfast.evaluation.features import INCEPTION_URL, hash_files, load_clip, load_features
from sidfast.evaluation.images import ImageFolder, image_files, sized
from sidfast.evaluation.judge import Judge
from sidfast.evaluation.processes import joined
from sidfast.evaluation.reference import drawn_reference, measure_reference, open_reference
from sidfast.evaluation.rows import FolderRows, collect
from sidfast.publishing.export import find_pipeline, load_pipeline, sampler_options

HELD_OUT = "shapes:held_out"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PACKAGES = ("sidfast", "torch", "torchmetrics", "torch-fidelity", "diffusers", "transformers")
_SHAPES_IMAGES = 10_000


@dataclass(frozen=True)
class Request:
    """What is asked for: the options of `sidfast evaluate` (docs/evaluation.md)."""

    model: str
    out: Path
    prompts: str | None = None
    reference: str | None = None
    images: int | None = None
    seeds_per_prompt: int = 1
    metrics: str | None = None
    features: str | None = None
    clip: str | None = None
    steps: int | None = None
    guidance: float | None = None
    batch_size: int = 16
    dtype: str = "fp32"
    seed_offset: int = 0
    resize: int | None = None
    filter: str = "bicubic"
    assets: str = "assets"
    cache: Path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sidfast"

    @property
    def of_shapes(self):
        """Whether the prompts are captions of the shapes world, drawn by code."""
        return self.prompts == HELD_OUT


def coco_options(folder, options):
    """The options of the COCO-30k protocol (method.md, section 9), once captions and crops are prepared.

    `options`: those that the user gave; they win where the protocol leaves a choice. Raises UserError for others.
    """
    for name in ("prompts", "reference", "resize"):
        if name in options:
            raise UserError(f"--{name}: --coco brings its own; give one of the two")
    with joined() as group:
        group.together(lambda: prepare_coco(folder), first_only=True)
    captions, crops = prepare_coco(folder)               # there by now, for every process
    fixed = {"prompts": str(captions), "reference": str(crops), "resize": SIDE}
    return fixed if "images" in options else fixed | {"images": caption_count(captions)}


def evaluate_model(request, device):
    """Measure a model and write the result as JSON to `request.out`. Raises UserError for whatever is at fault in it.

    A collective call where several processes were launched; the first one writes.
    """
    with joined() as group:
        job = group.together(lambda: _Job(request, device))
        started = time.time()
        reference = job.measure_reference(group)
        rows = FolderRows(request.out.with_name(f".{request.out.name}.partial"), job.key)
        if group.together(rows.open, first_only=True) is False:
            print(f"sidfast: {rows.folder} was of another evaluation; starting afresh", file=sys.stderr)
        collect(job.make, job.prompts, job.judge.rows, rows, request.batch_size, "evaluate", group)
        if group.rank == 0:
            result = job.result(rows, reference, group.processes)
            result["seconds"] = round(time.time() - started, 1)
            partial = request.out.with_name(f".{request.out.name}.json.partial")
            partial.write_text(json.dumps(result, indent=2) + "\n")
            partial.replace(request.out)
            rows.remove()
            print(json.dumps(result, indent=2))


class _Job:
    """A request whose every part was found and checked, before the first image is made."""

    def __init__(self, request, device):
        _check_numbers(request)
        self.request = request
        default = "fid,clip,accuracy" if request.of_shapes else "fid,clip"
        self.metrics = numbers.parse_metrics(request.metrics or default)
        if "diversity" in self.metrics and request.seeds_per_prompt < 2:
            raise UserError("--metrics diversity: needs several images of each prompt; give --seeds-per-prompt 2")
        folder = _image_folder(request)
        self.prompts = _prompts(request, self.metrics, len(folder) if folder else None)
        self.judge = _judge(request, self.metrics, device)
        features = self.judge.features
        if features:
            numbers.check_count(self.metrics, len(self.prompts), features.dimension, "--images")
        if "accuracy" in self.metrics:
            shapes.parse_captions(self.prompts)
        self.reference, self.reference_folder = self._open_reference()
        make, self.model = _generator(request, self.prompts, folder, device)
        size = self.reference.size if self.reference else (shapes.IMAGE_SIZE,) * 2 if request.of_shapes else None
        self.make = sized(make, request.resize, request.filter, size)
        self.key = {"model": self.model, "prompts": self._prompts_sha256(), "images": len(self.prompts),
                    "seeds": [request.seed_offset, request.seeds_per_prompt], "batch_size": request.batch_size,
                    "resize": [request.resize, request.filter], "metrics": sorted(self.metrics),
                    "networks": [n and n.sha256 for n in (features, self.judge.clip)]}

    def measure_reference(self, group):
        """The Reference with its features, or None; a collective call."""
        if not self.judge.features:
            return None
        if self.reference is None:
            return drawn_reference(self.prompts, self.judge, self.request.cache, group)
        return measure_reference(self.reference, self.reference_folder, self.judge, self.request.cache, group)

    def result(self, rows, reference, processes):
        """Everything that the result file says, but for the time."""
        r, judge, known = self.request, self.judge, {}
        if judge.features:
            known["reference"] = reference.describe()
            known["features"] = judge.features.describe()
        if judge.clip:
            known["clip"] = judge.clip.describe()
        return {
            "model": self.model, "prompts": {"source": r.prompts, "sha256": self._prompts_sha256()}, **known,
            "images": len(self.prompts),
            "seeds": {"first": r.seed_offset, "last": r.seed_offset + len(self.prompts) - 1,
                      "per_prompt": r.seeds_per_prompt} if "files" not in self.model else None,
            "resampling": {"side": r.resize, "filter": f"{r.filter}, antialiased"} if r.resize else None,
            "metrics": numbers.compute(rows, self.metrics, reference, judge.features and judge.features.suffix,
                                       judge.clip and judge.clip.suffix, r.seeds_per_prompt),
            "settings": numbers.settings(self.metrics, len(self.prompts), reference.images if reference else None),
            "batch_size": r.batch_size, "processes": processes,
            "versions": {name: version(name) for name in _PACKAGES}}

    def _open_reference(self):
        if not self.judge.features or (self.request.of_shapes and self.request.reference is None):
            return None, None
        if self.request.reference is None:
            raise UserError(f"--reference: {', '.join(sorted(self.metrics & numbers.OF_FEATURES))} need the folder of "
                            "real images (or an .npz of their statistics) to compare with")
        reference, folder = open_reference(self.request.reference)
        numbers.check_reference(self.metrics, reference, folder)
        if reference.images:
            numbers.check_count(self.metrics, reference.images, self.judge.features.dimension, "--reference")
        return reference, folder

    def _prompts_sha256(self):
        if self.request.prompts is None:
            return None
        return hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()


def _check_numbers(request):
    for name, least in (("images", 2), ("batch_size", 1), ("seeds_per_prompt", 1), ("seed_offset", 0), ("resize", 1)):
        value = getattr(request, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} ({value}) must be at least {least}")
    if not request.out.parent.is_dir():
        raise UserError(f"--out {request.out}: the folder {request.out.parent} does not exist")
    if request.out.is_dir():
        raise UserError(f"--out {request.out}: is a folder; a file is needed")


def _image_folder(request):
    """The model as a folder of images already generated, or None."""
    folder = Path(request.model)
    if not folder.is_dir() or (folder / "model_index.json").is_file() or (folder / "config.json").is_file():
        return None
    return ImageFolder(folder, "--model") if image_files(folder) else None


def _prompts(request, metrics, stored):
    """The prompt of each image, in order; `stored`: images of a folder, of which no more can be asked."""
    k = request.seeds_per_prompt
    if request.of_shapes:
        images = request.images or stored or _SHAPES_IMAGES
        prompts = held_out_captions(-(-images // k))
    elif request.prompts:
        if request.prompts.startswith("shapes:"):
            raise UserError(f"--prompts {request.prompts}: the split for evaluations is {HELD_OUT}")
        prompts = read_prompts(request.prompts)
        images = request.images or stored or len(prompts) * k
    elif stored and not metrics & {"clip", "accuracy"}:
        images = request.images or stored
        prompts = [""] * images
    else:
        raise UserError(f"--prompts: a text file, one prompt a line, is needed (or {HELD_OUT})")
    if images > len(prompts) * k:
        raise UserError(f"--prompts {request.prompts}: {len(prompts)} prompts are too few for {images} images"
                        f"{f' with {k} seeds each' if k > 1 else ''}")
    if "diversity" in metrics and images % k:
        raise UserError(f"--images {images}: must be a multiple of --seeds-per-prompt ({k}) for diversity")
    if stored and images > stored:
        raise UserError(f"--model {request.model}: {stored} images are in the folder, {images} are asked for")
    return [prompts[i // k] for i in range(images)]


def _judge(request, metrics, device):
    small = f"{request.assets}/clip" if request.of_shapes else None
    features = clip = checker = None
    if metrics & numbers.OF_FEATURES:
        spec = request.features or (f"clip:{small}" if small else None)
        if spec is None:
            raise UserError(f"--features: the feature network is missing; give inception:FILE (the weights are at "
                            f"{INCEPTION_URL}) or clip:FOLDER")
        features = load_features(spec, device)
    if metrics & {"clip", "diversity"}:
        folder = request.clip or small
        if folder is None:
            raise UserError("--clip: the CLIP is missing; give the folder of one in transformers format")
        same = features and features.path == folder
        clip = features if same else load_clip(folder, device)
    if "accuracy" in metrics:
        checker = load_checker(Path(request.assets) / "checker", device)
    return Judge(features, clip, checker, "diversity" in metrics, device)


def _generator(request, prompts, folder, device):
    """(make(start, stop) -> images, what a result says of the model)."""
    if folder is not None:
        if request.steps is not None or request.guidance is not None:
            raise UserError(f"--model {request.model}: a folder of images takes neither --steps nor --guidance")
        return folder, {"path": request.model, "files": len(folder), "sha256": folder.sha256(len(prompts))}
    pipe, one_step = load_pipeline(request.model, device, DTYPES[request.dtype])
    options = sampler_options(request.model, one_step, request.steps, request.guidance)
    generate = pipeline_generator(pipe, **options)
    place = find_pipeline(request.model)
    files = sorted(p for p in place.rglob("*") if p.suffix in (".json", ".safetensors", ".txt", ".model"))
    described = {"path": request.model, "pipeline": type(pipe).__name__, "dtype": request.dtype,
                 "steps": options.get("num_inference_steps", 1), "guidance": options.get("guidance_scale"),
                 "sha256": hash_files(files, place) if place.is_dir() else None}

    def make(start, stop):
        return generate(prompts[start:stop], range(request.seed_offset + start, request.seed_offset + stop))

    return make, described
