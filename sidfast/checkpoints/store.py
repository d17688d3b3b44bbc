"""Checkpoints: complete or absent, never half; safetensors and JSON, no pickle; any ZeRO stage, any process count.

    step-XXXXXXXX/NETWORK.KIND-RANK-of-RANKS.safetensors    whole fp32 tensors by parameter name, dealt out to processes
    step-XXXXXXXX/state.json                                step, counters, loss scale, size and SHA-256 of every file;
                                                            and of itself (state.py)
    latest                                                  the name of the newest folder, written last
    best                                                    if there: names of folders, one a line, never pruned

Folders of other names, copies of checkpoints too, are not ours: nothing here reads, moves or removes them.
`saver.py` writes them; this module is their format, and reads them.
"""

import hashlib
import heapq
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from sidfast.checkpoints.format import STATE, check_state, file_name, files_of, is_steady, read_state, seal
from sidfast.common.errors import UserError
from sidfast.common.files import flush, remove, write_atomically
from sidfast.common.files import sweep as sweep_files
from sidfast.engines.blocks import param_slices
from sidfast.engines.engine import (
    ENGINES,
    MOMENTS,
    gather,
    load_loss_scale,
    load_moments,
    loss_scale_state,
    master_weights,
    moments,
    optimizer_step,
    scatter,
)

_PREFIX, _PARTIAL, _OLD = "step-", ".partial-", ".old-"
_NAME = re.compile(_PREFIX + "([0-9]{8}|[1-9][0-9]{8,})(?![0-9])")           # what `step_folder` makes of a step


def snapshot(engines, ema, extra_state=None):
    """This process's share of all that must be saved, in host memory: {file name: {tensor name: fp32}}.

    A collective call, and the only part of saving that training waits for. `extra_state`: {name: {kind: tensors
    laid out like the engine's master weights}} to keep besides.
    """
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    files = {}
    for name, engine in engines.items():
        mine = _share(engine, rank, ranks)
        kinds = {"weights": master_weights(engine), **moments(engine)}
        if name == "generator":
            kinds["ema"] = ema.shards
        kinds |= (extra_state or {}).get(name, {})
        for kind, tensors in kinds.items():
            files[file_name(name, kind, rank, ranks)] = gather(engine, tensors, mine.__contains__)
    return files


def engine_states(engines):
    """What state.json holds of each engine."""
    return {name: {"optimizer_step": optimizer_step(e), "loss_scale": loss_scale_state(e)}
            for name, e in engines.items()}


def step_folder(folder, step, partial=False):
    """The folder of a checkpoint, or the one in which it is put together."""
    return Path(folder) / f"{_PARTIAL if partial else ''}{_PREFIX}{step:08d}"


def complete(folder, step, state, keep, lost=()):
    """Make the checkpoint that was put together a complete one, then remove those beyond the newest `keep`.

    `state`: what state.json will hold; `lost`: extra_state folders to remove. Folders that `best` names stay, and where
    updates were being left out as all the newest were made, the last one from before. Raises OSError.
    """
    partial, final = step_folder(folder, step, partial=True), step_folder(folder, step)
    write_atomically(partial / STATE, seal(state))
    for file in partial.iterdir():                       # (safetensors writes files that their owner alone can read)
        shutil.copymode(partial / STATE, file)
    flush(partial)
    if final.is_dir():                                   # a damaged one: a good one is never written twice
        discard(final)
    partial.rename(final)
    flush(folder)
    write_atomically(folder / "latest", final.name + "\n")
    others = [f for f in by_age(folder) if f.name not in _best(folder)]
    lost = [f for f in others if f in lost and f != final]
    whole = [f for f in others if f not in lost]
    before = [] if any(map(is_steady, whole[:keep])) else list(filter(is_steady, whole[keep:]))[:1]
    for old in lost + [f for f in whole[keep:] if f not in before]:
        discard(old)


def discard(folder):
    """Remove a folder in such a way that a kill in between leaves nothing that looks like a checkpoint.

    Raises OSError if it cannot be renamed.
    """
    old = folder.with_name(_OLD + folder.name)
    remove(old)
    folder.rename(old)
    remove(old)


def sweep(folder):
    """Remove what killed processes left half-done: folders, and files in the making. For the run's owner alone."""
    sweep_files(folder, age=0)
    for prefix in (_PARTIAL, _OLD):
        for left in Path(folder).glob(f"{prefix}*"):
            if _step(left.name.removeprefix(prefix)) is not None:
                remove(left)


def by_age(folder):
    """Checkpoint folders, newest first."""
    own = [f for f in Path(folder).glob(f"{_PREFIX}*") if _step(f.name) is not None and f.is_dir()]
    return sorted(own, key=lambda f: _step(f.name), reverse=True)


def find_checkpoint(folder, warn):
    """The newest whole checkpoint in `folder`, or None if there are none. `warn(message)` is told of every damaged one.

    Raises UserError if all are.
    """
    return _first_whole(by_age(folder), lambda path: checkpoint_fault(path) or content_fault(path), warn)


def choose_checkpoint(out, resume, warn):
    """The newest whole checkpoint of the run in `out`, or else the one that `resume` names; None to start afresh.

    A collective call: the first process decides, the work of reading every file and comparing checksums is shared.
    `warn` as in `find_checkpoint`. Raises UserError if the one that was asked for is damaged, or all of them are.
    """
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def fault_of(path):
        fault = checkpoint_fault(path) or content_fault(path, rank, ranks)
        return next((f for f in _gathered(fault) if f), None)

    if resume == "never":
        return None
    if resume == "auto":
        return _first_whole(_gathered(by_age(Path(out) / "checkpoints"))[0], fault_of, warn)
    own = _gathered(by_age(Path(out) / "checkpoints"))[0]                    # the same command again: it goes on
    if own:
        return _first_whole(own, fault_of, warn)
    fault = fault_of(Path(resume))
    if fault:
        raise UserError(f"--resume {resume}: no complete checkpoint ({fault})")
    return Path(resume)


def _first_whole(candidates, fault_of, warn):
    for candidate in candidates:
        fault = fault_of(candidate)
        if fault is None:
            return candidate
        older = candidate != candidates[-1]
        warn(f"checkpoint {candidate} is damaged ({fault})" + "; falling back to the one before it" * older)
    if candidates:
        raise UserError(f"{candidates[0].parent}: no whole checkpoint is left; remove that folder to start afresh")
    return None


def checkpoint_fault(path):
    """What is wrong with a checkpoint folder at first sight (all but the files' contents), in a few words, or None."""
    try:
        state = read_state(path)
        check_state(state)
    except OSError as error:
        return f"{STATE} is missing" if isinstance(error, FileNotFoundError) else f"{STATE}: {error.strerror}"
    except ValueError as error:
        return f"{STATE} is broken ({error})"
    if _step(path.name) not in (None, state["step"]):    # (a copy may be called anything)
        return f"{STATE} is of step {state['step']}"
    for name, entry in state["files"].items():
        try:
            size = (path / name).stat().st_size
        except OSError as error:
            return f"{name} is missing" if isinstance(error, FileNotFoundError) else f"{name}: {error.strerror}"
        if size != entry["bytes"]:
            return f"{name} has {size} of {entry['bytes']} bytes"
    return None


def content_fault(path, rank=0, ranks=1):
    """The same for the contents (SHA-256) of every `ranks`-th file, from number `rank` on."""
    files = read_state(path)["files"]
    for name in sorted(files)[rank::ranks]:
        try:
            if checksum(path / name) != files[name]["sha256"]:
                return f"{name} is not what was written: its checksum differs"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def checksum(file):
    """SHA-256 of a file, in hexadecimal. Raises OSError."""
    digest, block = hashlib.sha256(), bytearray(2**22)
    with open(file, "rb", buffering=0) as f:
        while size := f.readinto(block):
            digest.update(memoryview(block)[:size])
    return digest.hexdigest()


def check_fits(path, network, optimizers):
    """Raise UserError unless a checkpoint is of networks like `network`, by names and shapes, and has the moments that
    `optimizers` (of a configuration) go on from."""
    want = {name: list(p.shape) for name, p in network.named_parameters()}
    for network in ENGINES:
        if _shapes(path, network, "weights") != want:
            raise UserError(f"--resume {path}: is of another architecture than the teacher (the {network}'s weights "
                            "differ in name or shape)")
        beta1 = getattr(optimizers, network).beta1
        if beta1 > 0 and not _shapes(path, network, "exp_avg"):
            raise UserError(f"--resume {path}: is of a run with optimizer.{network}.beta1 = 0, which keeps no first "
                            f"moment for one with {beta1:g} to go on from")


def _shapes(path, network, kind):
    """{name: shape} of what `read_tensors` reads."""
    shapes = {}
    for name in files_of(read_state(path), network, kind):
        with _opened(Path(path) / name) as f:
            shapes |= {key: f.get_slice(key).get_shape() for key in f.keys()}   # noqa: SIM118 (not a dictionary)
    return shapes


def read_tensors(path, network, kind):
    """Whole tensors {name: fp32} of one kind ("weights", "exp_avg", "exp_avg_sq", "ema") of a network, {} of a
    kind that the checkpoint lacks; of the files that its state.json lists, whose contents were checked, and no others.
    Raises UserError for a file that is something else."""
    tensors = {}
    for name in files_of(read_state(path), network, kind):
        with _opened(Path(path) / name) as f:
            tensors |= {key: f.get_tensor(key) for key in f.keys()}             # noqa: SIM118 (not a dictionary)
    return tensors


@contextmanager
def _opened(file):
    try:
        with safe_open(file, "pt") as f:
            yield f
    except SafetensorError as error:
        raise UserError(f"{file}: is no safetensors file ({error})") from None


def restore(path, engines, ema):
    """Bring engines and average to the state of a checkpoint that fits (`check_fits`).

    The modules must have been given the checkpoint's weights before DeepSpeed took them over (`read_tensors`): their
    low-precision copies are made from those.
    """
    state = read_state(path)
    for name, engine in engines.items():
        scatter(engine, read_tensors(path, name, "weights"), master_weights(engine))
        saved = state["engines"][name]
        load_moments(engine, {kind: read_tensors(path, name, kind) for kind in MOMENTS}, saved["optimizer_step"])
        load_loss_scale(engine, saved["loss_scale"])
    ema.restore(read_tensors(path, "generator", "ema"))


def _share(engine, rank, ranks):
    """The parameter names that this process writes: from the largest on, each goes to the process with least so far."""
    sizes = {place.name: place.shape.numel() for _, found in param_slices(engine.module.network) for place in found}
    dealt, names = [(0, r) for r in range(ranks)], set()
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        size, to = dealt[0]
        heapq.heapreplace(dealt, (size + sizes[name], to))
        if to == rank:
            names.add(name)
    return names


def _step(name):
    """The step in a checkpoint's name; None for any other name."""
    found = _NAME.fullmatch(name)
    return found and int(found[1])


def _best(folder):
    path = Path(folder) / "best"                         # written by hand, whatever the editor puts around the names
    text = path.read_bytes().replace(b"\0", b"").decode("ascii", "replace") if path.is_file() else ""
    return [found[0] for found in _NAME.finditer(text)]


def _gathered(value):
    """Every process's value, in the order of ranks; a collective call."""
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
