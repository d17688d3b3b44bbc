"""`sidfast evaluate`: from a model, prompts and a reference to a result file that says what it means.

An image depends on its seed and prompt alone. What was measured on each is saved beside the result while the
evaluation runs, so the same command goes on after an interruption and comes to the same numbers.
"""

import glob
import json
import re
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from sidfast.accel.pipeline import fuse_pipeline
from sidfast.accel.precision import DTYPES, tf32
from sidfast.common.errors import UserError, one_line, say, speaks
from sidfast.common.extras import need
from sidfast.common.files import check_file, drop_lock, remove, sweep, take_lock, write_atomically
from sidfast.data.lengths import count_cut
from sidfast.evaluation.coco import SIDE, caption_count, prepare_coco
from sidfast.evaluation.evaluate import pipeline_generator
from sidfast.evaluation.features import hash_files
from sidfast.evaluation.images import ImageFolder, has_images
from sidfast.evaluation.metrics import over_repeats
from sidfast.evaluation.processes import joined
from sidfast.evaluation.protocol import EvaluationOptions, EvaluationSpec
from sidfast.evaluation.results import is_result, result_table
from sidfast.evaluation.rows import FolderRows, collect
from sidfast.publishing.export import read_distillation
from sidfast.publishing.load import find_pipeline, load_pipeline, loading_notes, sampler_options
from sidfast.teachers.clip import most_tokens, prompt_limit

_PACKAGES = ("sidfast", "torch", "torchmetrics", "torch-fidelity", "diffusers", "transformers")


@dataclass(frozen=True, kw_only=True)
class Request(EvaluationOptions):
    """What is asked for: the options of `sidfast evaluate` (docs/evaluation.md)."""

    model: str
    out: Path
    seeds: int = 1
    steps: int | None = None
    guidance: float | None = None
    batch_size: int = 16
    dtype: str = "fp32"
    fused: bool = False
    tf32: bool = False
    seed_offset: int = 0


def coco_options(folder, options):
    """The options of the COCO-30k protocol (method.md, section 9), once captions and crops are prepared.

    `options`: those that the user gave; they win where the protocol leaves a choice. Raises UserError for others.
    """
    if "out" in options:
        check_out(options["out"])
    for name in ("prompts", "prompts_column", "reference", "resize"):
        if name in options:
            raise UserError(f"--{name.replace('_', '-')}: --coco brings its own; give one of the two")
    with joined() as group:
        group.together(lambda: prepare_coco(folder), first_only=True)
    captions, crops = prepare_coco(folder)               # there by now, for every process
    fixed = {"prompts": str(captions), "reference": str(crops), "resize": SIDE}
    return fixed if "images" in options else fixed | {"images": caption_count(captions)}


def evaluate_model(request, device):
    """Measure a model and write the result as JSON to `request.out`. Raises UserError for whatever is at fault in it.

    A collective call where several processes were launched; the first one writes.
    """
    with tf32(request.tf32), joined() as group, _alone(request, group):
        job = group.together(lambda: _Job(request, device))
        started = time.time()
        reference = job.protocol.measure_reference(group)
        measured = [_measure(job, repeat, group) for repeat in range(request.seeds)]
        if group.rank == 0:
            result = job.result([rows for rows, _ in measured], reference, group.processes)
            result |= {"seconds": round(time.time() - started, 1), "resumed_after": sum(found for _, found in measured)}
            write_atomically(request.out, json.dumps(result, indent=2) + "\n")
            _remove_rows(request.out)
            sweep(request.out.parent)
            say(f"{result_table(result)}\n{request.out}: {result['images']:,} images of {one_line(request.model)}")


@contextmanager
def _alone(request, group):
    """No other evaluation has the same --out meanwhile: they would take each other's blocks. A collective call."""
    group.together(lambda: _check_numbers(request))
    lock = group.together(lambda: _claim(request.out), first_only=True)
    try:
        yield
    finally:
        if lock:
            drop_lock(lock)


def _claim(out):
    try:
        lock = take_lock(out.with_name(f".{out.name}.lock"))
    except OSError as error:
        raise UserError(f"--out {out}: nothing can be written to {out.parent} ({error.strerror})") from None
    if lock is None:
        raise UserError(f"--out {out}: another `sidfast evaluate` is at work on it; wait for it, or give another name")
    return lock


def _measure(job, repeat, group):
    """(What is measured on each image of one set of seeds, how many images an interrupted evaluation had measured).

    The count is None but for the first process.
    """
    request = job.request
    key = job.key | {"seeds": [job.first_seed(repeat), request.seeds_per_prompt]}
    rows = FolderRows(_rows_folder(request.out, repeat), key)
    found = group.together(lambda: _open_rows(rows), first_only=True)
    description = f"evaluate, seeds {repeat + 1} of {request.seeds}" if request.seeds > 1 else "evaluate"
    make = job.protocol.sized(job.maker(repeat))
    try:
        collect(make, job.protocol.prompts, job.protocol.judge.rows, rows, request.batch_size, description, group)
    except UserError:                                    # a fault of the images: there is nothing to go on with
        if group.rank == 0:
            _remove_rows(request.out)
        raise
    return rows, found


def _open_rows(rows):
    if not rows.open():
        print(f"sidfast: {rows.folder} was of another evaluation; starting afresh", file=sys.stderr)
    return rows.count()


def _rows_folder(out, repeat):
    return out.with_name(f".{out.name}.partial{f'-{repeat + 1}' if repeat else ''}")


def _remove_rows(out):
    """Delete the folders of all sets of seeds, also those of an earlier evaluation with more of them."""
    for path in out.parent.glob(f"{glob.escape(_rows_folder(out, 0).name)}*"):
        if re.fullmatch(r"\.partial(-\d+)?", path.name.removeprefix(f".{out.name}")):
            remove(path)


class _Job:
    """A request whose every part was found and checked, before the first image is made.

    Repeat number r makes an image of each prompt (or several) with seeds that no other repeat uses.
    """

    def __init__(self, request, device):
        if request.seeds > 1:
            need("scipy", "eval", f"--seeds {request.seeds}")
        self.request, self.folder = request, _image_folder(request)
        self.protocol = EvaluationSpec(request, device, len(self.folder) if self.folder else None, _tell)
        clip = self.protocol.judge.clip
        limits = {"clip": clip and (clip.tokenizer, most_tokens(clip.tokenizer, clip.clip.config.text_config))}
        if self.folder:
            if request.prompts is not None:
                self.folder.check_numbers(len(self.protocol.prompts))
            self.model = {"path": request.model, "files": len(self.folder),
                          "sha256": self.folder.sha256(len(self.protocol.prompts))}
        else:
            self.generate, self.model, limits["model"] = _open_model(request, device)
        self.cut = self._count_cut(limits)
        self.key = {"model": self.model, "prompts": self.protocol.prompts_sha256(),
                    "images": len(self.protocol.prompts), "batch_size": request.batch_size,
                    "resize": [request.resize, request.filter], "metrics": sorted(self.protocol.metrics),
                    "networks": self.protocol.networks(), "tf32": request.tf32}

    def first_seed(self, repeat):
        """Of a repeat's first image; the next ones count up."""
        return self.request.seed_offset + repeat * len(self.protocol.prompts)

    def maker(self, repeat):
        """make(start, stop) -> the images of a repeat."""
        if self.folder:
            return self.folder
        prompts, first = self.protocol.prompts, self.first_seed(repeat)
        return lambda start, stop: self.generate(prompts[start:stop], range(first + start, first + stop))

    def result(self, sets, reference, processes):
        """Everything that the result file says, but for the time. `sets`: the rows of each repeat."""
        each = [self.protocol.compute(rows, reference) for rows in sets]
        about = self.protocol.describe(reference)
        return {"model": self.model, **about, "prompts": about["prompts"] | {"cut": self.cut},
                "seeds": None if self.folder else self._seeds(0, len(sets) - 1), **self._numbers(each),
                "batch_size": self.request.batch_size, "tf32": self.request.tf32, "processes": processes,
                "versions": {name: version(name) for name in _PACKAGES}}

    def _count_cut(self, limits):
        """{network: how many prompts its text encoder does not take whole}, of {network: (tokenizer, most) or None}."""
        if self.request.prompts is None:
            return {}
        prompts = self.protocol.prompts[::self.request.seeds_per_prompt]
        cut = {name: count_cut(limit[0], prompts, limit[1]) for name, limit in limits.items() if limit}
        for name, count in cut.items():
            if count:
                _tell(f"{count:,} of {len(prompts):,} prompts have more than the {limits[name][1]} tokens that the "
                      f"text encoder of --{name} takes; the rest of the text is cut off")
        return cut

    def _numbers(self, each):
        """Metrics with their 95 % intervals: over images, or over repeats where there are several."""
        if len(each) == 1:
            return {"metrics": each[0][0], "intervals": {"of": "95 %, over images", **each[0][1]}}
        both = over_repeats([metrics for metrics, _ in each])
        return {"metrics": {name: mean for name, (mean, _) in both.items()},
                "intervals": {"of": f"95 %, t over {len(each)} sets of seeds",
                              **{name: interval for name, (_, interval) in both.items()}},
                "repeats": [{"seeds": self._seeds(i, i), "metrics": metrics} for i, (metrics, _) in enumerate(each)]}

    def _seeds(self, first, last):
        return {"first": self.first_seed(first), "last": self.first_seed(last + 1) - 1,
                "per_prompt": self.request.seeds_per_prompt}


def _check_numbers(request):
    for name, least in (("images", 2), ("batch_size", 1), ("seeds_per_prompt", 1), ("seeds", 1), ("seed_offset", 0),
                        ("resize", 1)):
        value = getattr(request, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} ({value}) must be at least {least}")
    if request.seed_offset >= 2**62:
        raise UserError(f"--seed-offset ({request.seed_offset}) must be below 2^62")
    check_out(request.out)


def check_out(out):
    """Raise UserError unless a result can be written to `out`, and nothing but a result would be replaced by it."""
    check_file(out, ".json")
    if out.exists() and not is_result(out):
        raise UserError(f"--out {out}: is no result of `sidfast evaluate` and is not replaced; choose another name")


def _image_folder(request):
    """The model as a folder of images already generated, or None."""
    folder = Path(request.model)
    if not folder.is_dir() or (folder / "model_index.json").is_file():
        return None
    if any((folder / name).is_dir() for name in ("export", "checkpoints")):                  # (a run directory)
        return None
    if (folder / "config.json").is_file() and not has_images(folder):
        return None
    for name in ("steps", "guidance"):
        if getattr(request, name) is not None:
            raise UserError(f"--model {folder}: a folder of images takes neither --steps nor --guidance")
    if request.fused:
        raise UserError(f"--model {folder}: a folder of images takes no --fused")
    if request.seeds > 1:
        raise UserError(f"--seeds {request.seeds}: {folder} is a folder of images, one set; give each set as a model "
                        "of its own, and all results to `sidfast compare`")
    return ImageFolder(folder, "--model", _tell)


def _tell(message):
    """A line on standard error, from the first process."""
    if speaks():
        print(f"sidfast: {one_line(message)}", file=sys.stderr)


def _open_model(request, device):
    """(generate(prompts, seeds) -> images, what a result says of the model, `prompt_limit`)."""
    pipe, one_step = load_pipeline(request.model, device, DTYPES[request.dtype])
    options = sampler_options(request.model, pipe, one_step, request.steps, request.guidance)
    if request.fused:
        doubled = options.get("guidance_scale", 1) > 1   # diffusers' pipelines then run both branches in one pass
        fuse_pipeline(pipe, request.batch_size * (1 + doubled), f"--fused: {request.model}")
    place = find_pipeline(request.model)
    files = sorted(p for p in place.rglob("*") if p.suffix in (".json", ".safetensors", ".txt", ".model"))
    described = {"path": request.model, "pipeline": type(pipe).__name__, "left_out": [], **loading_notes(request.model),
                 "scheduler": type(pipe.scheduler).__name__, "dtype": request.dtype,
                 "fused": request.fused, "steps": options.get("num_inference_steps", 1),
                 "guidance": options.get("guidance_scale"), "sha256": hash_files(files, place)}
    if not Path(request.model).is_dir():                 # of a hub id, kept in a folder named after its commit
        described["revision"] = place.name
    distillation = read_distillation(place)
    described |= {"distillation": distillation} if distillation else {}
    return pipeline_generator(pipe, **options), described, prompt_limit(pipe)
