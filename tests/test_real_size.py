"""The whole path at real size: random weights in the real architectures, two iterations, an export that diffusers runs.

Needs a GPU and 30 GB of disk (`--basetemp /dev/shm/sidfast` takes it from memory): `make test-gpu`.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment, free_port

from sidfast import cli
from sidfast.teachers.families import ARCHITECTURES

MICRO_BATCH = {"sd15": 8, "sd21": 8, "sd21-768": 2}


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_iterations_and_the_export(architecture, tmp_path):
    teacher, run = tmp_path / "teacher", tmp_path / "run"
    assert cli.main(["random-teacher", "--architecture", architecture, "--out", str(teacher)]) == 0
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square on a white background\n")
    settings = {"model.teacher": teacher, "data.prompts": tmp_path / "prompts.txt", "train.images": "null",
                "train.steps": 2, "train.batch_size": 16, "train.micro_batch": MICRO_BATCH[architecture],
                "train.log_every": 1, "train.samples": 2}
    path = f"{Path(sys.executable).parent}:{environment(0)['PATH']}"
    command = [shutil.which("deepspeed", path=path), "--log_level", "error", "--master_port",
               str(free_port()), "sidfast/train.py", "--config",
               f"configs/{architecture}.json", "--out", str(run), *(
                   word for key, value in settings.items() for word in ("--set", f"{key}={value}"))]
    done = subprocess.run(command, cwd=ROOT, env=environment(29741, gpu=True) | {"PATH": path}, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    print(architecture, rows)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["non_finite"] == 0 and row["fake_score_loss"] > 0 for row in rows)
    shutil.rmtree(run / "checkpoints")                   # 24 GB

    import torch
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(str(run / "export"), trust_remote_code=True, torch_dtype=torch.bfloat16)
    side = 8 * ARCHITECTURES[architecture][2]
    images = pipe.to("cuda")(["a red circle", "a blue square"], output_type="pt").images
    assert images.shape == (2, 3, side, side) and images.isfinite().all() and images.std() > 0
