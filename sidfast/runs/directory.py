"""The run directory: configuration, metrics, trackers, sample grids, export. Written by the first process."""

import errno
import json
import os
import platform
import subprocess
import sys
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from sidfast.checkpoints.saver import WRITE_ERRORS, describe
from sidfast.checkpoints.store import by_age, checkpoint_fault
from sidfast.common.errors import RunError, UserError
from sidfast.common.files import is_temporary, replacing, sweep, write_atomically
from sidfast.common.records import EVALUATIONS, LINES, read_evaluations, read_lines, read_metrics
from sidfast.config.schema import build_config
from sidfast.monitoring.trackers import open_trackers
from sidfast.publishing.export import read_distillation
from sidfast.publishing.grid import save_grid
from sidfast.runs.identity import check_settings, locate_inputs, read_own
from sidfast.runs.lock import NAME as LOCK


def open_run(out, config, resume):
    """Check that a run may start or go on in `out`, which this job has claimed; nothing is written yet.

    `resume`: "auto" (go on where this run stopped), "never", or the path of a checkpoint, also of another run. Raises
    UserError if `out` holds a run with another configuration or with damaged files, or anything but a run.
    """
    out = Path(out)
    previous = out / "config.json"
    occupied = out.is_dir() and not is_unused(out)
    if occupied and not previous.is_file():
        raise UserError(f"--out {out}: the folder is not empty and holds no run; choose another")
    if occupied:
        check_settings(previous, config)
        _check_kept(out)
        _check_folders(out)
    if occupied and resume != "auto" and resume not in _read_command(out):
        raise UserError(f"--out {out}: holds a run already; choose another folder, or --resume auto to go on with it")
    if resume not in ("auto", "never") and (Path(resume) / "checkpoints").is_dir():
        raise UserError(f"--resume {resume}: is a run; name one of its checkpoints ({resume}/checkpoints/step-...)")
    fault = resume not in ("auto", "never") and checkpoint_fault(Path(resume))
    if fault:
        raise UserError(f"--resume {resume}: no complete checkpoint ({fault})")


def is_unused(folder, besides=()):
    """Whether a folder holds only the names `besides`, and what a run leaves that was killed before its config.json."""
    names = (LOCK, ".config.json.partial", *besides)     # (the second is of version 0.1.0)
    return all(path.name in names or is_temporary(path) for path in Path(folder).iterdir())


def _check_kept(out):
    """UserError, naming the file, for what a run left and cannot go on with; a run does not leave that by itself."""
    read_metrics(out)
    list(read_lines(out / LINES[1]))
    read_evaluations(out)
    for name in ("export", "best"):
        read_distillation(out / name)


def _check_folders(out):
    """UserError for what stands in the place of a run's folders, and for checkpoints that were taken away (or whose
    disk is not there): to begin again would overwrite the export that they led to."""
    for name in ("checkpoints", "samples", "tensorboard", "export", "best"):
        path = out / name
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path}: is a link to {path.readlink()}, which is not there")
        if path.exists() and not path.is_dir():
            raise UserError(f"{path}: is a file, where a run has a folder; move it away")
    if lacks_checkpoints(out):
        raise UserError(f"--out {out}: holds an export, but its checkpoints are gone; put them back, or choose another "
                        "--out")


def is_complete(out, config, step):
    """Whether a run that has made its last step lacks nothing that a start with `config` would make: export, samples,
    measures, report."""
    out = Path(out)
    before = build_config(read_own(out)["config"], out / "config.json")
    same = (before.evaluation, before.train.samples) == (config.evaluation, config.train.samples)
    measured = not config.evaluation.images or read_evaluations(out).get("end", {}).get("step") == step
    sampled = not config.train.samples or sample_of(out, step).is_file()
    exported = read_distillation(out / "export").get("step") == step
    return same and measured and sampled and exported and (out / "report.html").is_file()


def sample_of(out, step):
    """The file of a run's sample grid of a step."""
    return Path(out) / "samples" / f"step-{step:08d}.png"


def lacks_checkpoints(out):
    """Whether a run has an export, which is written with every checkpoint, but no checkpoint."""
    return (Path(out) / "export").is_dir() and not by_age(Path(out) / "checkpoints")


def _read_command(out):
    """The words of the command that a run was last started with: the same command again goes on."""
    return [word.removeprefix("--resume=") for word in read_own(out).get("command") or [] if word != "never"]


class RunDirectory:
    """Everything that a run writes besides checkpoints, into a folder that this job has claimed (lock.py)."""

    def __init__(self, out, config, step, **facts):
        """Open (or go on with) a run at `step`: metrics of later steps are dropped, they will come again.

        `facts`: JSON values that config.json keeps beside the configuration. Raises RunError if the disk is full.
        """
        self.out, self.lost, self.inputs = Path(out), [], facts.get("inputs")
        started = read_own(self.out).get("started") if (self.out / "config.json").is_file() else _now()
        about = json.dumps(_describe(config) | {"started": started} | facts, indent=2) + "\n"
        try:
            self._open(about, step)
            self._trackers = open_trackers(config.train.tracker, self.out, config.model_dump(), step, started)
        except WRITE_ERRORS as error:
            raise RunError(f"the run cannot begin: {describe(error)} in {out}") from None

    def _open(self, about, step):
        self.out.mkdir(parents=True, exist_ok=True)
        for folder in (self.out, self.out / "samples"):
            sweep(folder, age=0)
        write_atomically(self.out / "config.json", about)          # the first file: by it `open_run` knows a run
        (self.out / "samples").mkdir(exist_ok=True)
        self._metrics, self._spikes = (LineFile(self.out / name, step) for name in LINES)

    def log(self, step, values):
        """One line of metrics.jsonl, and its numbers for the trackers."""
        with self.attempt("a line of metrics.jsonl (it will come with the next)"):
            self._metrics.write({"step": step} | values)
        self._track("scalars", step, {key: value for key, value in values.items() if isinstance(value, (int, float))})

    def _track(self, what, *values):
        for tracker in self._trackers:
            with self.attempt(tracker.name):
                getattr(tracker, what)(*values)

    def spikes(self, lines):
        """Lines of spikes.jsonl."""
        for line in lines:
            with self.attempt("a line of spikes.jsonl (it will come with the next)"):
                self._spikes.write(line)

    @contextmanager
    def attempt(self, what):
        """Something to write that training can do without: a full disk is told of, once for each `what`."""
        try:
            yield
        except WRITE_ERRORS as error:
            if what not in self.lost:
                self.lost.append(what)
                print(f"sidfast: {what} could not be written: {describe(error)} in {self.out}; training goes on",
                      file=sys.stderr, flush=True)
        else:
            self.lost = [name for name in self.lost if name != what]

    def sample(self, step, picture):
        """Save a sample grid (of `image_grid`)."""
        with self.attempt("a sample grid"), replacing(sample_of(self.out, step)) as file:
            save_grid(picture, file)
        self._track("image", step, picture)

    def has_sample(self, step):
        """Whether the sample grid of a step is there."""
        return sample_of(self.out, step).is_file()

    def has_measures(self, step):
        """Whether metrics.jsonl has the evaluation of a step."""
        return any(line["step"] == step and any(key.startswith("evaluation/") for key in line)
                   for line in read_lines(self.out / "metrics.jsonl"))

    def evaluation(self, name, values=None):
        """Get (without `values`) or set the evaluation called `name`; kept in evaluation.json."""
        known = read_evaluations(self.out)
        if values is not None:
            with self.attempt("an evaluation"):
                write_atomically(self.out / EVALUATIONS, json.dumps(known | {name: values}, indent=2) + "\n")
        return known.get(name) if values is None else values

    def close(self):
        """Write what the trackers still hold."""
        self._track("close")


class LineFile:
    """A file of JSON lines that is whole at any time, also on a full disk: what found no room comes with the next."""

    def __init__(self, path, step):
        """Go on with a file at `step`: later lines are dropped, and one that was being written when the run ended."""
        self.path, self._waiting = path, b""
        if path.is_file():
            kept = [line for line in read_lines(path) if line["step"] <= step]
            write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, values):
        """Append a line. Raises OSError if it must wait."""
        self._waiting += json.dumps(values).encode() + b"\n"
        with open(self.path, "ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                written = file.write(self._waiting)
                if written < len(self._waiting):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(end)
                raise
        self._waiting = b""


def _describe(config):
    """The resolved configuration, and what it runs on."""
    packages = ("torch", "triton", "diffusers", "transformers", "deepspeed", "xformers", "safetensors", "sidfast")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"config": config.model_dump(), "paths": locate_inputs(config), "command": sys.argv,
            "folder": os.getcwd(),
            "python": platform.python_version(), "versions": {name: _version(name) for name in packages},
            "git": _git_commit(), "processes": int(os.environ.get("WORLD_SIZE", 1)),
            "hardware": {"gpus": gpus, "cpus": os.cpu_count(), "processor": platform.processor() or platform.machine()}}


def _now():
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit():
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
