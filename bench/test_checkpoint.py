"""What training waits for when it saves: SD 1.5 with random weights through the trainer, bf16, fused, on one GPU.

A save costs the step the copy to host memory, and later steps whatever writing takes from them.
"""

import pytest
import torch
from test_step import BF16, teacher  # noqa: F401 (a fixture)
from training import run_training

EVERY, STEPS, SIZE = 4, 10, 128


def test_stall(teacher, record, tmp_path):  # noqa: F811
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    rows = run_training(tmp_path, teacher, {"deepspeed": BF16}, SIZE, 8, STEPS, gpus=1, save_every=EVERY)
    seconds = {row["step"]: SIZE / row["images_per_s"] for row in rows}
    usual = sorted(seconds[step] for step in range(2, EVERY + 1))[1]
    for number, save in enumerate(range(EVERY, STEPS - 1, EVERY), 1):            # (the next line tells of a save)
        copy = next(row["seconds/checkpoint"] for row in rows if row["step"] == save + 1)
        slower = sum(seconds[step] - usual for step in range(save + 1, min(save + EVERY, STEPS) + 1))
        record("SD 1.5, stall of a save, seconds", f"save {number}", {
            "copy": copy, "later_steps": slower, "step": usual})
        assert copy + slower < 1
