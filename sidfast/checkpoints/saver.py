"""Saving beside the training: the step waits for a copy in host memory only, a thread of each process writes it.

A checkpoint becomes complete once every process has told the first that its files are on disk (through the store, not
by a collective call: those belong to the training thread). What fails, a full disk above all, costs that checkpoint
and nothing else; whatever it is, everyone is told, or the others would wait, and the last step would pass for saved.
"""

import contextlib
import errno
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from sidfast.checkpoints import store as checkpoint
from sidfast.checkpoints.format import FORMAT, is_steady
from sidfast.common.files import flush, remove

WRITE_ERRORS = (OSError, SafetensorError)                # what a full or broken disk raises
_FILES_AT_ONCE = 4                                       # writing and checksums are both slower than disks


class Saver:
    """Writes the checkpoints of a run into `folder`, one at a time, and keeps the newest `keep`."""

    def __init__(self, folder, keep, channel, timeout, warn, begun=None, run=None):
        """A collective call. `timeout`: seconds that one process waits for the others' files; `warn(message)`: told, on
        the first process, what could not be saved; `begun`: the checkpoint that training goes on from. Newer ones were
        damaged: they go once there is a good one again. `run`: what checkpoints say of their run (`describe_run`; of
        the first process)."""
        self.folder, self.keep, self.warn, self._run_of = Path(folder), keep, warn, run
        found = checkpoint.by_age(folder)
        self._lost = found[:found.index(Path(begun))] if begun is not None and Path(begun) in found else []
        self.rank, self.ranks = channel.rank, channel.ranks
        self._store = channel.connect(timeout)
        self._thread, self._saves, self._fault = None, 0, None
        self.saved = None                                # the step of the newest complete checkpoint of this saver
        if self.rank == 0:
            checkpoint.sweep(self.folder)
        torch.distributed.barrier()

    @staticmethod
    def warm_up(engines, ema, extra_state=None):
        """Take the host memory that a save needs, and give it back to PyTorch, which keeps it; a collective call.
        A GPU's driver locks its pages, which takes seconds: the first save would wait for that otherwise."""
        if torch.cuda.is_initialized():
            first = torch.distributed.get_rank() == 0
            held = checkpoint.snapshot(engines, ema, extra_state), ema.gather(lambda name: first)
            del held

    def save(self, step, engines, ema, extra, extra_state=None):
        """Begin to save; a collective call that returns when the state has been copied to host memory.

        `extra`: JSON values to get back on resume; `extra_state`: see `checkpoint.snapshot`. Waits for the save
        before this one, if it is still being written.
        """
        self.wait()
        tensors = checkpoint.snapshot(engines, ema, extra_state)
        state = {"format": FORMAT, "step": step, "extra": extra, "engines": checkpoint.engine_states(engines),
                 "run": self._run_of}
        self._saves += 1
        self._thread = threading.Thread(target=self._run, args=(self._saves, step, tensors, state), daemon=True)
        self._thread.start()

    def wait(self):
        """Wait until nothing is being written. Returns what went wrong with the last save, or None; alike on all
        processes."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self._fault

    def _run(self, number, step, tensors, state):
        try:
            self._fault = self._write(number, step, tensors, state)
        except Exception as error:                       # (of the store: nothing can be agreed any more)
            self._fault = describe(error)
        if self._fault is None:
            self.saved = step
        elif self.rank == 0:
            remove(checkpoint.step_folder(self.folder, step, partial=True))
            self.warn(f"the checkpoint of step {step} could not be saved: {self._fault}. Training goes on; the last "
                      f"good checkpoint is {last_good(self.folder)}")

    def _write(self, number, step, tensors, state):
        """Write this process's files, then agree with the others. Returns a fault, or None."""
        size = sum(t.numel() * t.element_size() for file in tensors.values() for t in file.values())
        files, fault = self._write_files(checkpoint.step_folder(self.folder, step, partial=True), tensors)
        self._store.set(f"save/{number}/{self.rank}", json.dumps({"files": files, "fault": fault, "bytes": size}))
        tensors.clear()
        if self.rank == 0:
            self._store.set(f"save/{number}/outcome", json.dumps(self._complete(number, step, state)))
        return json.loads(self._store.get(f"save/{number}/outcome"))

    def _write_files(self, partial, tensors):
        """({name: size and checksum}, None), or ({}, fault) with this process's files removed again."""
        try:
            if partial.is_symlink():                     # (in a folder that others can write to)
                remove(partial)
            partial.mkdir(parents=True, exist_ok=True)
            with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
                written = pool.map(_write_file, (partial / name for name in tensors), tensors.values())
                return dict(zip(tensors, written, strict=True)), None
        except Exception as error:
            for name in tensors:
                with contextlib.suppress(OSError):       # (the folder may be what is at fault)
                    (partial / name).unlink()
            return {}, describe(error)

    def _complete(self, number, step, state):
        """On the first process: make a checkpoint of everyone's files. Returns a fault, or None."""
        try:
            reports = [json.loads(self._store.get(f"save/{number}/{rank}")) for rank in range(self.ranks)]
        except Exception as error:                       # (others may wait for the outcome all the same)
            return describe(error)
        fault = next((r["fault"] for r in reports if r["fault"]), None)
        if fault is None:
            files = dict(sorted(item for r in reports for item in r["files"].items()))
            try:
                checkpoint.complete(self.folder, step, state | {"files": files}, self.keep, self._lost)
                self._lost = []
            except Exception as error:
                fault = describe(error)
        return fault and f"{fault} in {self.folder}, {space(self.folder, sum(r['bytes'] for r in reports))}"


def _write_file(path, tensors):
    """Write a file through to the disk. Its size and checksum."""
    save_file(tensors, path)
    flush(path)
    return {"bytes": path.stat().st_size, "sha256": checkpoint.checksum(path)}


def describe(error):
    """A few words for an error: of writing, or in a thread that writes."""
    text = getattr(error, "strerror", None) or str(error).partition("\n")[0]
    if isinstance(error, torch.distributed.DistError):   # another process is gone
        return f"the other processes do not answer ({text})"
    if not isinstance(error, WRITE_ERRORS):
        return f"{type(error).__name__} ({text})" if text else type(error).__name__
    return "no space left" if getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in text else text


def space(folder, needed):
    """How much space a save needs, and how much there is."""
    try:
        free = f"{_size(shutil.disk_usage(folder).free)} free"
    except OSError:
        free = "which cannot be reached"
    return f"which needs {_size(needed)} ({free})"


def last_good(folder, steady=False):
    """The newest complete checkpoint by its files' sizes, or "none"; `steady`: of those alone at which no network was
    leaving its updates out."""
    return next((f for f in checkpoint.by_age(folder) if checkpoint.checkpoint_fault(f) is None
                 and (not steady or is_steady(f))), "none")


def _size(count):
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"
