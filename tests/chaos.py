"""Faults, one after another, into training runs: `python tests/chaos.py --faults 100 --seed 0`.

Every run is hit several times, started again with the same configuration each time, and must end bit for bit like one
that was left alone: same metrics, same final checkpoint. Before every start all checkpoints are read and compared with
their checksums. Processes are forked from this one, which has the libraries loaded, and are looked after as DeepSpeed's
launcher does (one fails: the others are ended); the kind "launcher" takes the real one. The disk is a small tmpfs (root
only; without it the kinds of a full disk are left out, and said to be).
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from sidfast.common.environment import prepare_environment

prepare_environment()
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}

import torch  # noqa: E402
from forks import fork  # noqa: E402
from safetensors import safe_open  # noqa: E402
from tiny import write_tiny_teacher  # noqa: E402

from sidfast.checkpoints.format import STATE, read_state  # noqa: E402
from sidfast.checkpoints.store import by_age, checkpoint_fault, checksum, read_tensors  # noqa: E402

ROOT = Path(__file__).parents[1]
STEPS, BATCH, PATIENCE = 24, 4, 300                      # of a run; seconds that anything may take
KINDS = ("kill a process", "kill during checkpoint", "kill during export", "SIGTERM", "SIGUSR1", "SIGINT",
         "disk full", "disk full at the end", "damaged checkpoint", "launcher")
KEPT = {"generator": ("weights", "exp_avg_sq", "ema"), "fake_score": ("weights", "exp_avg", "exp_avg_sq")}


class Failed(Exception):
    """The run did not do what it must."""


class Job:
    """The processes of one start."""

    def __init__(self, config, out, port, ranks, *args, launcher=False):
        self.log = out.parents[2] / f"{out.parent.name}.log"                 # not on the disk that is filled
        self.launcher, self.codes = None, {}
        self.log.write_bytes(b"")
        command = ["--config", str(config), "--out", str(out), "--set", f"train.micro_batch={BATCH // ranks}", *args]
        if launcher:
            self._launch(command, port, ranks)
        else:
            common = os.environ | {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                                   "MASTER_PORT": str(port)}
            self.pids = [fork("train", command, common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, self.log,
                              self.log) for rank in range(ranks)]

    def _launch(self, command, port, ranks):
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        with open(self.log, "ab") as log:
            self.launcher = subprocess.Popen(
                [shutil.which("deepspeed", path=path), "--log_level", "error", "--num_accelerators", str(ranks),
                 "--master_port", str(port), "sidfast/train.py", *command],
                cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
                env=os.environ | {"PATH": path})
        self.pids = []

    def find(self):
        """Process ids of the real launcher's own child and of the workers."""
        import psutil

        family = psutil.Process(self.launcher.pid).children(recursive=True)
        inner = [p for p in family if "deepspeed.launcher.launch" in p.cmdline()]
        self.pids = [p.pid for p in family if p not in inner]
        return inner[0].pid

    def running(self):
        """Collects exit codes; ends the others when one has failed. Whether any process still runs."""
        if self.launcher:
            return self.launcher.poll() is None
        for pid in [p for p in self.pids if p not in self.codes]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self.codes[pid] = os.waitstatus_to_exitcode(status)
        if any(self.codes.values()):
            self.end()
        return len(self.codes) < len(self.pids)

    def end(self, patience=10):
        """SIGTERM, then SIGKILL, to what still runs."""
        for number, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, PATIENCE)):
            left = [p for p in self.pids if p not in self.codes]
            for pid in left:
                os.kill(pid, number)
            deadline = time.monotonic() + seconds
            while left and time.monotonic() < deadline:
                for pid in list(left):
                    done, status = os.waitpid(pid, os.WNOHANG)
                    if done:
                        self.codes[pid] = os.waitstatus_to_exitcode(status)
                        left.remove(pid)
                time.sleep(0.02)

    def wait_until(self, condition):
        """True once it holds, False if the job ends first."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if not self.running():
                return False
            if time.monotonic() > deadline:
                self.end(0)
                raise Failed(f"nothing happened for {PATIENCE} s: {self.text()[-1500:]}")
            time.sleep(0.001)
        return True

    def finish(self):
        """Exit codes once all have ended."""
        self.wait_until(lambda: False)
        return list(self.codes.values()) if not self.launcher else [self.launcher.returncode]

    def text(self):
        return self.log.read_text(errors="replace")


class Run:
    """One run, hit until its share of faults is used up, then left to end."""

    def __init__(self, folder, config, ranks, port, chance, full_disk):
        self.folder, self.config, self.ranks, self.port, self.chance = folder, config, ranks, port, chance
        self.out, self.full_disk, self.exported = folder / "run", full_disk, False
        self.done, self.seconds_to_stop = Counter(), []

    def kinds(self):
        return [k for k in KINDS if self.full_disk or not k.startswith("disk full")]

    def hit(self, kind):
        """One start with one fault. Whether the fault came before the run was over."""
        self.check()
        if kind == "damaged checkpoint":
            return self._damage()
        job = Job(self.config, self.out, self.port, self.ranks, launcher=kind == "launcher")
        before = self._lines()
        moment = {"kill during checkpoint": lambda: any(self.out.glob("checkpoints/.partial-*/*")),
                  "kill during export": lambda: any(self.out.glob(".export.partial/*"))}.get(
            kind, lambda: self._lines() > before)
        if not job.wait_until(moment):
            return self._over(job)
        time.sleep(self.chance.random() * (0.02 if kind.startswith("kill during") else 1.0))
        act = {"SIGTERM": self._stop, "SIGUSR1": self._stop, "SIGINT": self._stop, "disk full": self._fill,
               "disk full at the end": self._fill, "launcher": self._launcher}.get(kind, self._kill)
        hit = act(job, kind)
        if hit:
            self.done[kind] += 1
        return hit

    def _lines(self):
        path = self.out / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def _over(self, job):
        if any(job.finish()):
            raise Failed(f"exit codes {job.codes}: {job.text()[-3000:]}")
        return False

    def _kill(self, job, kind):
        rank = 0 if kind == "kill during export" else self.chance.randrange(self.ranks)
        if not job.running():
            return self._over(job)
        os.kill(job.pids[rank], signal.SIGKILL)
        return -signal.SIGKILL in job.finish()

    def _stop(self, job, kind):
        if not job.running():
            return self._over(job)
        begin = time.monotonic()
        os.kill(job.pids[self.chance.randrange(self.ranks)], signal.Signals[kind])
        if any(job.finish()):
            raise Failed(f"exit codes {job.codes} after {kind}: {job.text()[-3000:]}")
        self.seconds_to_stop.append(time.monotonic() - begin)
        if self.seconds_to_stop[-1] > 30:
            raise Failed(f"{self.seconds_to_stop[-1]:.0f} s to stop")
        return f"stopped by {kind}" in job.text()

    def _fill(self, job, kind):
        filler = self.folder / "filler"
        with open(filler, "wb", buffering=0) as file:
            for size in (2**20, 2**12, 1):
                while True:
                    try:
                        file.write(bytes(size))
                    except OSError:
                        break
        if kind == "disk full":
            told = job.wait_until(lambda: "could not be saved: no space left" in job.text())
            filler.unlink()
            if not told:
                return self._over(job)
            lines = self._lines()
            if job.wait_until(lambda: self._lines() > lines + 1):            # it goes on; so may other faults
                self._kill(job, kind)
            elif any(job.codes.values()) and f"step {STEPS} is not saved" not in job.text():
                raise Failed(f"exit codes {job.codes} on a full disk: {job.text()[-3000:]}")
            return True
        codes = job.finish()
        filler.unlink()
        if any(codes) and f"step {STEPS} is not saved: no space left" not in job.text():
            raise Failed(f"exit codes {codes} on a full disk: {job.text()[-3000:]}")
        return any(codes)

    def _launcher(self, job, kind):
        pids = [job.launcher.pid, job.find()]
        workers, target, number = job.pids, self.chance.choice(pids), self.chance.choice(
            (signal.SIGKILL, signal.SIGTERM))
        os.kill(target, number)
        deadline = time.monotonic() + 60
        while any(_alive(pid) for pid in workers):
            if time.monotonic() > deadline:
                raise Failed(f"workers outlive their launcher: {job.text()[-3000:]}")
            time.sleep(0.05)
        job.launcher.wait()
        missed = pids.index(target) == 1 and number == signal.SIGTERM and "stopped by SIGTERM" not in job.text()
        if missed and self._lines() < STEPS:             # (otherwise it came after the last step)
            raise Failed(f"SIGTERM to the launcher did not save: {job.text()[-3000:]}")
        return not missed

    def _damage(self):
        """Flip one bit of the newest of at least two checkpoints; the next start must say so and fall back."""
        newest, *older = by_age(self.out / "checkpoints") or [None]
        if not older:
            return False
        file = self.chance.choice((newest / STATE, self.chance.choice(sorted(newest.glob("*.safetensors")))))
        content = bytearray(file.read_bytes())
        content[self.chance.randrange(len(content))] ^= 1 << self.chance.randrange(8)
        file.write_bytes(content)
        job = Job(self.config, self.out, self.port, self.ranks)
        if not job.wait_until(lambda: "resuming from" in job.text()):
            raise Failed(f"no start: {job.text()[-3000:]}")
        if f"{newest} is damaged ({file.name}" not in job.text() or str(older[0]) not in job.text():
            raise Failed(f"the damage was not seen: {job.text()[-3000:]}")
        job.wait_until(lambda: not newest.exists() or read_intact(newest))
        self.done["damaged checkpoint"] += 1
        return self._kill(job, "kill a process")

    def check(self):
        """Everything that looks whole is whole."""
        for folder in by_age(self.out / "checkpoints"):
            if not read_intact(folder):
                raise Failed(f"{folder} is not what was written")
        export = self.out / "export"
        if self.exported and not export.is_dir() and not (self.out / ".export.old").is_dir():
            raise Failed("the export is gone")
        self.exported = self.exported or export.is_dir()
        for file in export.rglob("*.safetensors"):
            with safe_open(file, "pt") as f:
                for name in f.keys():                    # noqa: SIM118 (not a dictionary)
                    f.get_tensor(name)

    def end(self, want):
        """Let it end, and compare with the run that was left alone."""
        self.check()
        codes = Job(self.config, self.out, self.port, self.ranks).finish()
        if any(codes):
            raise Failed(f"exit codes {codes} at the end")
        self.check()
        if losses(self.out) != losses(want):
            raise Failed(f"metrics differ from those of {want}")
        compare_states(self.out, want)


def read_intact(folder):
    """Whether a checkpoint is exactly what its state.json says."""
    try:
        if checkpoint_fault(folder):
            return False
        return all(checksum(folder / name) == entry["sha256"] for name, entry in read_state(folder)["files"].items())
    except OSError:                                      # removed meanwhile
        return False


def losses(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["fake_score_loss"], r["generator_loss"]) for r in rows]


def compare_states(got, want):
    """Final weights, moments and average, bit for bit."""
    for network, kinds in KEPT.items():
        for kind in kinds:
            a, b = (read_tensors(run / "checkpoints" / f"step-{STEPS:08d}", network, kind) for run in (got, want))
            if not a or a.keys() != b.keys() or not all(torch.equal(a[k], b[k]) for k in a):
                raise Failed(f"{network} {kind} differs from the run that was left alone")


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def write_config(folder):
    """A tiny teacher and a configuration that logs every step and saves every third; one network has momentum."""
    write_tiny_teacher(folder / "teacher")
    values = {"model": {"teacher": str(folder / "teacher")}, "data": {"prompts": "shapes:train"},
              "train": {"steps": STEPS, "batch_size": BATCH, "log_every": 1, "save_every": 3,
                        "samples": 0, "keep": 3, "hang_timeout": 120},
              "optimizer": {"generator": {"lr": 1e-3}, "fake_score": {"lr": 1e-3, "beta1": 0.5}}}
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    return path


def chaos(folder, faults, seed, kinds=None, port=29950, per_run=10, seconds=float("inf"),
          ranks=(2, 2, 2, 4), say=print):
    """Run it; returns {kind: faults}. Raises Failed."""
    chance, total, runs, begin, stops = random.Random(seed), Counter(), 0, time.monotonic(), []
    config, disk = write_config(folder), folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(disk)],
                             capture_output=True).returncode == 0
    say(f"full disk: {'a tmpfs of 48 MiB' if mounted else 'not tested (no permission to mount a tmpfs)'}")
    undisturbed = {}
    try:
        while total.total() < faults and time.monotonic() - begin < seconds:
            count = chance.choice(ranks)
            if count not in undisturbed:
                undisturbed[count] = folder / "undisturbed" / f"of-{count}" / "run"
                undisturbed[count].parent.mkdir(parents=True)
                codes = Job(config, undisturbed[count], port, count).finish()
                if any(codes):
                    raise Failed(f"exit codes {codes} without a fault")
            place = disk / f"run-{runs}"
            place.mkdir()
            run = Run(place, config, count, port + 1 + runs % 40, chance, mounted)
            choices = kinds or run.kinds()
            for _ in range(min(per_run, faults - total.total())):
                kind = chance.choices(choices, [0.15 if k == "launcher" else 1 for k in choices])[0]
                hit = run.hit(kind)
                say(f"{time.monotonic() - begin:6.0f} s  run {runs} ({count} processes)  {kind}: "
                    f"{'hit' if hit else 'missed'}, {run._lines()} of {STEPS} steps")
                if not hit and run._lines() == STEPS:
                    break
            run.end(undisturbed[count])
            total, stops, runs = total + run.done, stops + run.seconds_to_stop, runs + 1
            say(f"{time.monotonic() - begin:6.0f} s  run {runs - 1} equals the undisturbed one after "
                f"{run.done.total()} faults; {total.total()} in all")
            shutil.rmtree(place)
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(disk)], check=False)
    say(f"{total.total()} faults in {runs} runs, {time.monotonic() - begin:.0f} s: all ended like the undisturbed one")
    for kind, count in sorted(total.items()):
        say(f"  {count:4d}  {kind}")
    if stops:
        say(f"an orderly stop took {sum(stops) / len(stops):.1f} s on average, {max(stops):.1f} s at most")
    return total


def main():
    parser = argparse.ArgumentParser(description="Faults into training runs; every run must end like one without.")
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further run after these")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, help="all unless given")
    parser.add_argument("--ranks", type=int, nargs="*", default=(2, 2, 2, 4), help="processes of a run: one is drawn")
    parser.add_argument("--port", type=int, default=29950)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    signal.signal(signal.SIGINT, signal.default_int_handler)                      # (ignored, if run in the background)
    try:
        chaos(folder, args.faults, args.seed, args.kinds, args.port, seconds=args.seconds, ranks=args.ranks,
              say=lambda line: print(line, flush=True))
    except Failed as error:
        print(f"FAILED: {error}\nkept: {folder}", flush=True)
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
