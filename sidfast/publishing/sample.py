"""`sidfast sample`: images of one or many prompts, as one picture or as files of a folder."""

import inspect
import itertools
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from sidfast.accel.precision import DTYPES
from sidfast.common.errors import UserError, one_line, tell
from sidfast.common.files import check_file, check_folder, check_writable, replacing, sweep
from sidfast.data.lengths import cut_note
from sidfast.data.prompts import read_prompts
from sidfast.publishing.generate import make_images, to_pil
from sidfast.publishing.grid import image_grid
from sidfast.publishing.load import load_pipeline, loading_notes, sampler_options
from sidfast.teachers.clip import prompt_limit

LIST = "images.jsonl"                                    # of a folder: file, prompt and seed of each image
_FORMATS = {".png": {"format": "PNG"}, ".jpg": {"format": "JPEG", "quality": 95, "subsampling": 0}}
_FORMATS[".jpeg"] = _FORMATS[".jpg"]
_MOST = 4096                                             # images in a picture
_MOST_SIDE = 16384                                       # pixels of an image
_MOST_JPEG = 65500                                       # pixels of a side, by the format
_NAME = 80                                               # bytes of a prompt in the name of a file


@dataclass(frozen=True)
class Request:
    """What is asked for; the fields are the options of the command."""

    model: str
    out: str
    prompt: str | None = None
    prompts: str | None = None
    prompts_column: str | None = None
    n: int = 1
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    dtype: str | None = None                             # of DTYPES; by default fp16 on a GPU, or else fp32
    format: str = "png"                                  # of the images of a folder: png or jpg


def make_samples(request, device):
    """Make `n` images of each prompt (seeds `seed`, `seed` + 1, ...): one picture with a row per seed and a column per
    prompt where `out` ends in .png or .jpg, or else a file for each in the folder `out`. Returns a line on what was
    written.

    Raises UserError for bad arguments, before anything is computed, and for images that are not finite.
    """
    prompts, out = _prompts(request), Path(request.out)
    as_files = _is_folder(request.out)
    _check_counts(request, len(prompts), as_files)
    _check_out(out, as_files)
    dtype = DTYPES[request.dtype or ("fp16" if device.type == "cuda" else "fp32")]
    pipe, one_step = load_pipeline(request.model, device, dtype)
    options = sampler_options(request.model, pipe, one_step, request.steps, request.guidance)
    options |= _size_options(request, pipe, one_step)
    pipe.set_progress_bar_config(disable=True)
    limit = prompt_limit(pipe)
    note = limit and cut_note(limit[0], prompts, limit[1])
    if note:
        tell(one_line(note))

    def make(text, seed):                                # one by one, so that a prompt's image is always the same
        return to_pil(make_images(pipe, [text], [seed], **options), f"--model {request.model}")[0]

    seeds = [request.seed + k for k in range(request.n)]
    try:
        said = (_write_files if as_files else _write_picture)(out, prompts, seeds, make, request.format)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror or error})") from None
    for line in _notes(loading_notes(request.model)):
        tell(one_line(f"--model {request.model}: {line}"))
    return said


def _write_picture(out, prompts, seeds, make, _):
    sweep(out.parent)
    bar = tqdm(total=len(seeds) * len(prompts), desc="images", mininterval=2, disable=None)
    rows, kind = {}, _FORMATS[out.suffix.lower()]
    for seed in seeds:
        images = rows[f"seed {seed}"] = []
        for text in prompts:
            images.append(make(text, seed))
            bar.update()
            if kind["format"] == "JPEG" and len(prompts) * images[0].width > _MOST_JPEG:
                raise UserError(f"--out {out}: {len(prompts)} columns are too wide for a JPEG; write a .png, or a "
                                "folder")
    bar.close()
    with replacing(out) as file:
        image_grid(rows, prompts).save(file, **kind)
    return f"{out}: {len(prompts)} x {len(seeds)} images of {images[0].width} x {images[0].height}"


def _write_files(out, prompts, seeds, make, ending):
    total, asked = len(prompts) * len(seeds), [(text, seed) for text in prompts for seed in seeds]
    digits = max(5, len(str(total - 1)))
    images = (make(text, seed) for text, seed in tqdm(asked, "images", mininterval=2, disable=None))
    first = next(images)                                 # (a model that makes none leaves no folder)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / LIST, "x", encoding="utf-8") as listed:
        for number, image in enumerate(itertools.chain([first], images)):
            text, seed = asked[number]
            name = "-".join([f"{number:0{digits}d}", *_words(text)]) + f".{ending}"
            with replacing(out / name, durable=False) as file:
                image.save(file, **_FORMATS[f".{ending}"])
            listed.write(json.dumps({"file": name, "prompt": text, "seed": seed}, ensure_ascii=False) + "\n")
            listed.flush()
    return f"{out}: {total} images of {first.width} x {first.height}; {LIST} has their prompts and seeds"


def _words(prompt):
    """The first words of a prompt, for the name of a file."""
    words, left = [], _NAME
    for word in re.findall(r"\w+", prompt.lower()):
        left -= len(os.fsencode(word)) + 1
        if left < 0:
            break
        words.append(word)
    return words


def _prompts(request):
    if request.prompt is None:
        return read_prompts(request.prompts, request.prompts_column, lambda text: tell(one_line(text)))
    if request.prompts_column is not None:
        raise UserError(f"--prompts-column {request.prompts_column}: is of a table that --prompts names; --prompt is "
                        "the prompt itself")
    return [_checked(request.prompt)]


def _is_folder(out):
    return out.endswith("/") or Path(out).is_dir() or not Path(out).suffix


def _check_counts(request, prompts, as_files):
    if request.n < 1:
        raise UserError(f"-n must be at least 1, not {request.n}")
    if not as_files and request.n * prompts > _MOST:
        raise UserError(f"-n {request.n} with {prompts} prompts: too many images for one picture; {_MOST} at most (for "
                        "more: a folder as --out)")
    if not 0 <= request.seed < 2**63 - request.n:
        raise UserError(f"--seed must be at least 0 and below 2^63, not {request.seed}")


def _check_out(out, as_files):
    if as_files:
        check_folder(out)
        if out.is_dir() and any(out.iterdir()):
            raise UserError(f"--out {out}: the folder is not empty; choose another")
    elif out.suffix.lower() not in _FORMATS:
        raise UserError(f"--out {out}: must end in .png or .jpg, or be a folder")
    else:
        check_file(out, out.suffix.lower())
        check_writable(out.parent, f"--out {out}")


def _size_options(request, pipe, one_step):
    """{"height": ..., "width": ...} as far as they are given. Raises UserError for sizes that have no latents."""
    factor = getattr(pipe, "vae_scale_factor", 8)
    factor = factor if one_step else math.lcm(factor, 8)             # (diffusers' pipelines want 8 in any case)
    given = {name: value for name in ("height", "width") if (value := getattr(request, name)) is not None}
    for name, value in given.items():
        if name not in inspect.signature(type(pipe).__call__).parameters:
            raise UserError(f"--{name} {value}: a {type(pipe).__name__} has a size of its own; leave it out")
        if not factor <= value <= _MOST_SIDE or value % factor:
            raise UserError(f"--{name} {value}: must be a multiple of {factor}, at most {_MOST_SIDE}")
    return given


def _notes(notes):
    """What a user should know of how the model was loaded, a line for each."""
    if notes.get("left_out"):
        yield f"used without its {', '.join(notes['left_out'])}"
    if notes.get("saved_as"):
        yield f"saved by a {notes['saved_as']}, used for text to image"


def _checked(prompt):
    """A prompt from the command line, whose bytes Python takes for half characters where they are not UTF-8."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"--prompt {prompt[:80]!a}: is not UTF-8") from None
    return prompt
