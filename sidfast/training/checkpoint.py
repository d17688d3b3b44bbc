"""Checkpoints: complete or absent, never half; safetensors and JSON, no pickle; any ZeRO stage, any process count.

    step-XXXXXXXX/NETWORK.KIND-RANK-of-RANKS.safetensors    whole fp32 tensors by parameter name, dealt out to processes
    step-XXXXXXXX/state.json                                step, counters, loss scale, and the size of every file
    latest                                                  the name of the newest folder, written last
"""

import json
import os
import shutil
from pathlib import Path

from deepspeed import comm
from safetensors import safe_open
from safetensors.torch import save_file

from sidfast.training.engines import (
    MOMENTS,
    gather,
    loss_scale_state,
    masters,
    moments,
    optimizer_step,
    restore_loss_scale,
    restore_moments,
    scatter,
)

_STATE = "state.json"
_PREFIX = "step-"


def save_checkpoint(folder, step, engines, ema, extra, keep):
    """Write `folder`/step-XXXXXXXX; a collective call.

    `engines`: {name: engine}; `extra`: JSON values to get back on resume. Older checkpoints beyond `keep` are removed
    once the new one is complete.
    """
    folder, rank, ranks = Path(folder), comm.get_rank(), comm.get_world_size()
    partial = folder / f".partial-{_PREFIX}{step:08d}"
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    comm.barrier()
    for name, engine in engines.items():
        mine = _share(engine, rank, ranks)
        kinds = {"weights": masters(engine), **{key: moments(engine, key) for key in MOMENTS}}
        if name == "generator":
            kinds["ema"] = ema.shards
        for kind, tensors in kinds.items():
            file = partial / f"{name}.{kind}-{rank:05d}-of-{ranks:05d}.safetensors"
            save_file(gather(engine, tensors, mine.__contains__), file)
            _flush(file)
    comm.barrier()
    if rank == 0:
        state = {"format": 1, "step": step, "extra": extra,
                 "engines": {name: {"optimizer_step": optimizer_step(e), "loss_scale": loss_scale_state(e)}
                             for name, e in engines.items()},
                 "files": {f.name: f.stat().st_size for f in sorted(partial.iterdir())}}
        _write_text(partial / _STATE, json.dumps(state, indent=1))
        final = folder / f"{_PREFIX}{step:08d}"
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _flush(folder)
        write_atomically(folder / "latest", final.name + "\n")
        for old in _by_age(folder)[keep:]:
            shutil.rmtree(old)
    comm.barrier()


def find_checkpoint(folder, warn):
    """The newest complete checkpoint in `folder`, or None. `warn(message)` is told of every damaged one."""
    for candidate in _by_age(Path(folder)):
        fault = checkpoint_fault(candidate)
        if fault is None:
            return candidate
        warn(f"checkpoint {candidate} is damaged ({fault}); falling back to the one before it")
    return None


def checkpoint_fault(path):
    """What is wrong with a checkpoint folder, in a few words, or None."""
    try:
        files = json.loads((path / _STATE).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{_STATE} is missing or broken"
    for name, size in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} of {size} bytes"
    return None


def read_state(path):
    """A checkpoint's state.json."""
    return json.loads((Path(path) / _STATE).read_text())


def read_tensors(path, network, kind):
    """Whole tensors {name: fp32} of one kind ("weights", "exp_avg", "exp_avg_sq", "ema") of a network."""
    tensors = {}
    for file in sorted(Path(path).glob(f"{network}.{kind}-*.safetensors")):
        with safe_open(file, "pt") as f:
            tensors |= {name: f.get_tensor(name) for name in f.keys()}          # noqa: SIM118 (not a dictionary)
    return tensors


def restore(path, engines, ema):
    """Bring engines and average to the state of a checkpoint.

    The modules must have been given the checkpoint's weights before DeepSpeed took them over (`read_tensors`): their
    low-precision copies are made from those.
    """
    state = read_state(path)
    for name, engine in engines.items():
        scatter(engine, read_tensors(path, name, "weights"), masters(engine))
        saved = state["engines"][name]
        restore_moments(engine, {key: read_tensors(path, name, key) for key in MOMENTS}, saved["optimizer_step"])
        restore_loss_scale(engine, saved["loss_scale"])
    ema.restore(read_tensors(path, "generator", "ema"))


def write_atomically(path, text):
    """Replace a text file as a whole, or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    _write_text(partial, text)
    partial.replace(path)
    _flush(path.parent)


def _share(engine, rank, ranks):
    """The parameter names that this process writes: every `ranks`-th."""
    return {name for i, (name, _) in enumerate(engine.module.unet.named_parameters()) if i % ranks == rank}


def _by_age(folder):
    return sorted(folder.glob(f"{_PREFIX}*"), reverse=True)


def _write_text(path, text):
    with open(path, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def _flush(path):
    """Make a file's or a folder's contents survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
