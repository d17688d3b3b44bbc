"""`sidfast export`: the averaged generator of any checkpoint as a diffusers pipeline, or as one file."""

import os
import sys
from pathlib import Path

from sidfast.accel.precision import DTYPES
from sidfast.checkpoints.format import read_state
from sidfast.checkpoints.saver import WRITE_ERRORS, describe
from sidfast.checkpoints.store import checkpoint_fault, content_fault, find_checkpoint, read_tensors
from sidfast.common.errors import UserError
from sidfast.common.files import check_file
from sidfast.common.records import read_run, recorded
from sidfast.config.schema import build_config
from sidfast.evaluation.metrics import title
from sidfast.publishing.card import write_card
from sidfast.publishing.export import holds_export, write_export
from sidfast.publishing.plain import describe_plain, plain_pipeline
from sidfast.runs.identity import check_origin, describe_distillation
from sidfast.teachers.fingerprint import TEACHER, describe_teacher, teacher_change
from sidfast.teachers.load import load_teacher
from sidfast.teachers.sd_single_file import write_single_file


def export_checkpoint(run, out, checkpoint=None, dtype="fp16", teacher=None, single_file=False, plain=False):
    """Write the average that a checkpoint holds to the folder `out`, as training writes RUN/export; all or nothing.

    `checkpoint`: its folder, the name of one in the run's folder checkpoints, or None for the run's newest. `teacher`:
    where the run's teacher is now, if it was moved. `single_file`: write one .safetensors file in the original layout
    of Stable Diffusion instead; `plain`: write a stock pipeline of diffusers (`plain_pipeline`). Returns (the number of
    updates, the noise level sigma at which the generator starts). Raises UserError for a folder that is no run or no
    complete checkpoint, for a teacher that is not
    there, for a teacher or checkpoint of another run, and for an `out` that holds anything but an export.
    """
    run, out = Path(run), Path(out)
    described = read_run(run, f"--run {run}: no run directory", "name another")
    config = build_config(described["config"], run / "config.json")
    check_file(out, ".safetensors") if single_file else _check_out(out)
    checkpoint, option = _find(run, checkpoint), "" if checkpoint is None else "--checkpoint "
    step = read_state(checkpoint)["step"]
    teacher = _open_teacher(run, config, described, teacher)
    inputs = recorded(described, "inputs") or describe_teacher(teacher)
    check_origin(checkpoint, config, inputs, option)
    try:
        network = teacher.student(read_tensors(checkpoint, "generator", "ema"), config.model.resolution)
    except RuntimeError:                                 # names or shapes of weights
        raise UserError(f"--checkpoint {checkpoint}: is not of this run's teacher, {config.model.teacher}") from None
    start = config.noise.t_init
    pipe = plain_pipeline(teacher, network) if plain else teacher.one_step_pipeline(network, start)
    sigma, about = teacher.schedule.log_sigma(start).exp().item(), describe_distillation(config, step, inputs)
    if plain:
        about["plain"] = describe_plain(teacher, pipe, start, config.model.resolution)
    try:
        if single_file:
            write_single_file(pipe, out, DTYPES[dtype], about | {"t_init": start, "sigma": sigma})
        else:
            write_export(pipe, out, DTYPES[dtype], about)
            write_card(run, out, title, str(teacher.folder))
    except WRITE_ERRORS as error:                        # (a full disk, or another process that writes there)
        raise UserError(f"--out {out}: cannot be written ({describe(error)})") from None
    return step, sigma


def _open_teacher(run, config, described, option):
    """The Teacher that a run began with, from where it was then, or from `option`."""
    name = option or str(recorded(described, "paths").get(TEACHER, config.model.teacher))
    if not option and os.path.isabs(name) and not os.path.isdir(name):
        raise UserError(f"--run {run}: its teacher is not at {name} any more; give the folder that it is in now as "
                        "--teacher DIR")
    teacher = load_teacher(name, f"--teacher {name}" if option else TEACHER, **config.model.loading)
    change = teacher_change(recorded(described, "inputs"), describe_teacher(teacher))
    if change and option:
        raise UserError(f"--teacher {name}: is not the teacher of {run} ({change})")
    if change:
        raise UserError(f"--run {run}: its teacher, {name}, is not what it was when that run began ({change}); put it "
                        "back, or give its folder as --teacher DIR")
    return teacher


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
    own = run / "checkpoints" / checkpoint
    path = own if own.is_dir() and not os.path.exists(checkpoint) else Path(checkpoint)
    fault = checkpoint_fault(path) or content_fault(path)
    if fault:
        raise UserError(f"--checkpoint {checkpoint}: no complete checkpoint ({fault})")
    return path
