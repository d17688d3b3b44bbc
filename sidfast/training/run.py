"""The run directory: configuration, metrics, TensorBoard events, sample grids, export. Written by the first process."""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from sidfast.config import build_config
from sidfast.errors import UserError
from sidfast.training.checkpoint import checkpoint_fault, find_checkpoint, write_atomically

# What may differ when a run goes on: how long, how often and how it runs, not what it computes.
_FREE = ("train.steps", "train.images", "train.log_every", "train.save_every", "train.keep", "train.sample_every",
         "train.samples", "train.micro_batch", "evaluation", "speed", "deepspeed")


def open_run(out, config, resume, warn):
    """Decide where a run starts; nothing is written yet. Returns the checkpoint to resume from, or None.

    `resume`: "auto" (go on where this run stopped), "never", or the path of a checkpoint, also of another run. Raises
    UserError if `out` holds a run with another configuration, or anything but a run.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file")
    previous = out / "config.json"
    occupied = out.is_dir() and any(out.iterdir())
    if occupied and not previous.is_file():
        raise UserError(f"--out {out}: the folder is not empty and holds no run; choose another")
    if occupied and resume != "auto":
        raise UserError(f"--out {out}: holds a run already; choose another folder, or --resume auto to go on with it")
    if occupied:
        _check_same(previous, config)
        return find_checkpoint(out / "checkpoints", warn)
    if resume in ("auto", "never"):
        return None
    fault = checkpoint_fault(Path(resume))
    if fault:
        raise UserError(f"--resume {resume}: no complete checkpoint ({fault})")
    return Path(resume)


def _check_same(path, config):
    try:
        before = build_config(json.loads(path.read_text())["config"], path).model_dump()
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: is not a run's configuration; choose another --out") from None
    old, new = _flatten(before), _flatten(config.model_dump())
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and not any(key == f or key.startswith(f + ".") for f in _FREE):
            raise UserError(f"--out {path.parent}: holds a run with another configuration ({key} is "
                            f"{old.get(key)!r} there and {new.get(key)!r} here); choose another --out")


def _flatten(values, prefix=""):
    flat = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


class RunDirectory:
    """Everything that a run writes besides checkpoints."""

    def __init__(self, out, config, step, **facts):
        """Open (or go on with) a run at `step`: metrics of later steps are dropped, they will come again.

        `facts`: JSON values that config.json keeps beside the configuration.
        """
        self.out = Path(out)
        (self.out / "samples").mkdir(parents=True, exist_ok=True)
        write_atomically(self.out / "config.json", json.dumps(_describe(config) | facts, indent=2) + "\n")
        self.metrics = self.out / "metrics.jsonl"
        kept = [line for line in self._lines() if line["step"] <= step]
        write_atomically(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(self.metrics, "a", encoding="utf-8")               # noqa: SIM115 (closed by close)
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(self.out / "tensorboard"), purge_step=step + 1)

    def log(self, step, values):
        """One line of metrics.jsonl, and TensorBoard scalars."""
        self._file.write(json.dumps({"step": step} | values) + "\n")
        self._file.flush()
        for key, value in values.items():
            if isinstance(value, (int, float)):
                self._board.add_scalar(key, value, step)

    def sample(self, step, picture):
        """Save a sample grid (a PIL image)."""
        partial = self.out / "samples" / f".step-{step:08d}.png"
        picture.save(partial, format="PNG")
        partial.replace(self.out / "samples" / f"step-{step:08d}.png")

    def evaluation(self, name, values=None):
        """Get (without `values`) or set the evaluation called `name`; kept in evaluation.json."""
        path = self.out / "evaluation.json"
        known = json.loads(path.read_text()) if path.is_file() else {}
        if values is not None:
            write_atomically(path, json.dumps(known | {name: values}, indent=2) + "\n")
        return known.get(name)

    def close(self):
        self._file.close()
        self._board.close()

    def _lines(self):
        """The complete lines of metrics.jsonl."""
        if not self.metrics.is_file():
            return
        for text in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(text)
            except ValueError:
                return                                   # the line that was being written when the run was killed


def _describe(config):
    """The resolved configuration, and what it runs on."""
    packages = ("torch", "triton", "diffusers", "transformers", "deepspeed", "xformers", "safetensors", "sidfast")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"config": config.model_dump(), "command": sys.argv, "python": platform.python_version(),
            "versions": {name: _version(name) for name in packages}, "git": _git_commit(),
            "hardware": {"gpus": gpus, "cpus": os.cpu_count(), "processor": platform.processor() or platform.machine()},
            "processes": int(os.environ.get("WORLD_SIZE", 1))}


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
