"""`sidfast export`: the averaged generator of any checkpoint as a diffusers pipeline."""

import sys
from pathlib import Path

import torch

from sidfast.config import build_config
from sidfast.errors import UserError
from sidfast.evaluation.metrics import title
from sidfast.networks.loading import load_teacher
from sidfast.publishing.card import write_card
from sidfast.publishing.export import holds_export, one_step_pipeline, student_unet, write_export
from sidfast.records import read_run
from sidfast.training.checkpoint import checkpoint_fault, content_fault, find_checkpoint, read_tensors
from sidfast.training.run import describe_distillation
from sidfast.training.state import read_state

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def export_checkpoint(run, out, checkpoint=None, dtype="fp16"):
    """Write the average that a checkpoint holds to the folder `out`, as training writes RUN/export; all or nothing.

    `checkpoint`: its folder, or None for the run's newest. Raises UserError for a folder that is no run or no complete
    checkpoint, for a teacher that is not there, and for an `out` that holds anything but an export.
    """
    run, out = Path(run), Path(out)
    about = read_run(run, f"--run {run}: no run directory", "name another")
    config = build_config(about["config"], run / "config.json")
    _check_out(out)
    checkpoint = _find(run, checkpoint)
    step = read_state(checkpoint)["step"]
    teacher = load_teacher(config.model.teacher, **config.model.loading)
    try:
        unet = student_unet(teacher, read_tensors(checkpoint, "generator", "ema"), config.model.resolution)
    except RuntimeError:                                 # names or shapes of weights
        raise UserError(f"--checkpoint {checkpoint}: is not of this run's teacher, {config.model.teacher}") from None
    write_export(one_step_pipeline(teacher, unet, config.noise.t_init), out, DTYPES[dtype],
                 describe_distillation(config, step))
    write_card(run, out, title)
    return step


def _check_out(out):
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"--out {out}: is a {'link' if out.is_symlink() else 'file'}; a folder is needed")
    if out.is_dir() and any(out.iterdir()) and not holds_export(out):
        raise UserError(f"--out {out}: the folder is not empty and is no export, or holds more than one; choose "
                        "another")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.parent} does not exist")


def _find(run, checkpoint):
    if checkpoint is None:
        found = find_checkpoint(run / "checkpoints", lambda text: print(f"sidfast: {text}", file=sys.stderr))
        if found is None:
            raise UserError(f"--run {run}: has no complete checkpoint yet")
        return found
    fault = checkpoint_fault(Path(checkpoint)) or content_fault(Path(checkpoint))
    if fault:
        raise UserError(f"--checkpoint {checkpoint}: no complete checkpoint ({fault})")
    return Path(checkpoint)
