"""The real trainer on SD 1.5's architecture with random weights, for benchmarks: `deepspeed sidfast/train.py`."""

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_training(folder, teacher, changes, size, micro_batch, steps, gpus=None, config="sd15", save_every=0, factor=1):
    """The lines of metrics.jsonl of a run, the first step's left out: it warms up.

    `changes`: sections of the configuration; `size`: global batch; `gpus`: how many, all unless given; `save_every`:
    steps between checkpoints, 0 for none; `factor`: train.fake_score_factor.
    """
    values = json.loads((ROOT / "configs" / f"{config}.json").read_text()) | {
        "model": {"teacher": str(teacher)}, "data": {"prompts": "shapes:train"},
        "train": {"steps": steps, "batch_size": size, "micro_batch": micro_batch, "fake_score_factor": factor,
                  "log_every": 1, "save_every": save_every, "samples": 0}} | changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    launcher = [shutil.which("deepspeed", path=path), "--log_level", "error", "--master_port", str(free_port())]
    command = [*launcher, *(["--num_gpus", str(gpus)] if gpus else []), "sidfast/train.py", "--config",
               str(folder / "config.json"), "--out", str(folder / "run")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "0", "PATH": path},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()][1:]


def free_port():
    """A TCP port that nobody has now, below those that connections get by chance before it is used."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def median_speed(rows):
    """Images/s."""
    return sorted(row["images_per_s"] for row in rows)[len(rows) // 2]
