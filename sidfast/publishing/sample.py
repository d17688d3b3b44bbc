"""`sidfast sample`: images of one or many prompts, as one picture."""

import sys
from pathlib import Path

import torch

from sidfast.common.errors import UserError, one_line
from sidfast.common.files import check_file, check_writable, replacing, sweep
from sidfast.data.lengths import cut_note
from sidfast.data.prompts import read_prompts
from sidfast.publishing.generate import make_images, to_pil
from sidfast.publishing.grid import image_grid
from sidfast.publishing.load import load_pipeline, loading_notes, sampler_options
from sidfast.teachers.clip import prompt_limit

_MOST = 4096                                             # images in a picture


def sample_grid(model, prompt, prompts_file, column, out, n, seed, steps, guidance, device):
    """Make `n` images of each prompt (seeds `seed`, `seed` + 1, ...) and write them to `out` as a PNG grid.

    `column`: of a table of prompts, or None. Raises UserError for bad arguments, before anything is computed, and for
    images that are not finite.
    """
    if prompt is not None and column is not None:
        raise UserError(f"--prompts-column {column}: is of a table that --prompts names; --prompt is the prompt itself")
    prompts = [_checked(prompt)] if prompt is not None else read_prompts(prompts_file, column, _tell)
    if n < 1:
        raise UserError(f"-n must be at least 1, not {n}")
    if n * len(prompts) > _MOST:
        raise UserError(f"-n {n} with {len(prompts)} prompts: too many images for one picture; {_MOST} at most (for "
                        "more: sidfast evaluate)")
    out = Path(out)
    check_file(out, ".png")
    check_writable(out.parent, f"--out {out}")
    if not 0 <= seed < 2**63 - n:
        raise UserError(f"--seed must be at least 0 and below 2^63, not {seed}")
    pipe, one_step = load_pipeline(model, device, torch.float16 if device.type == "cuda" else torch.float32)
    options = sampler_options(model, pipe, one_step, steps, guidance)
    pipe.set_progress_bar_config(disable=True)
    limit = prompt_limit(pipe)
    note = limit and cut_note(limit[0], prompts, limit[1])
    if note:
        _tell(note)
    rows = {}
    for k in range(n):
        rows[f"seed {seed + k}"] = [                     # one by one, so that a prompt's image is always the same
            to_pil(make_images(pipe, [text], [seed + k], **options), f"--model {model}")[0] for text in prompts]
    sweep(out.parent)
    with replacing(out) as file:
        image_grid(rows, prompts).save(file, format="PNG")
    for line in _notes(loading_notes(model)):
        _tell(f"--model {model}: {line}")


def _notes(notes):
    """What a user should know of how the model was loaded, a line for each."""
    if notes.get("left_out"):
        yield f"used without its {', '.join(notes['left_out'])}"
    if notes.get("saved_as"):
        yield f"saved by a {notes['saved_as']}, used for text to image"


def _tell(message):
    print(f"sidfast: {one_line(message)}", file=sys.stderr)


def _checked(prompt):
    """A prompt from the command line, whose bytes Python takes for half characters where they are not UTF-8."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"--prompt {prompt[:80]!a}: is not UTF-8") from None
    return prompt
