"""The whole training step through the real trainer: `deepspeed sidfast/train.py`, images/s, TFLOP/s and peak memory.

On a GPU: SD 1.5's architecture with random weights at 512 px, global batch 128, fused against the published algorithm
as plain PyTorch runs it in fp16 and fp32. On a CPU: the embedded teacher. Nothing is saved; start-up is not counted.
"""

import pytest
import torch
from training import ROOT, median_speed, run_training

from sidfast.teachers.random_init import write_random_teacher

TFLOP_PER_IMAGE = 18 * 0.803                             # 18 forward passes of SD 1.5 at kappas that are not 1
PLAIN = {"speed": {"fused": False, "cuda_graphs": False}}
FAST = {"speed": {"fused": True, "cuda_graphs": True}}
BF16, FP16 = ({name: options, "zero_optimization": {"stage": 1}} for name, options in (
    ("bf16", {"enabled": True}), ("fp16", {"enabled": True, "initial_scale_power": 2})))     # (updates that are kept)
VARIANTS = {
    **{f"fused, micro-batch {m}": ({"deepspeed": BF16, **FAST}, m, 1) for m in (4, 8)},
    "fused, micro-batch 16": ({"deepspeed": BF16, "speed": FAST["speed"] | {"overlap": False}}, 16, 1),  # (for 80 GB)
    "fused, generator 8, fake score 16": ({"deepspeed": BF16, **FAST}, 8, 2),
    "plain bf16": ({"deepspeed": BF16, **PLAIN}, 8, 1), "plain fp16": ({"deepspeed": FP16, **PLAIN}, 8, 1),
    "plain fp16, micro-batch 16": ({"deepspeed": FP16, **PLAIN}, 16, 1),
    "plain fp32": ({"deepspeed": {}, "speed": PLAIN["speed"] | {"tf32": False}}, 4, 1)}
LARGE = {"plain fp16, micro-batch 16": 100}             # GiB that a card must have


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    if not torch.cuda.is_available():
        return ROOT / "assets" / "teacher"
    folder = tmp_path_factory.mktemp("sd15")
    write_random_teacher("sd15", folder, torch.device("cuda"))
    torch.cuda.empty_cache()
    return folder


@pytest.mark.parametrize("name", VARIANTS)
def test_step(name, teacher, machine, record, tmp_path):
    changes, micro_batch, factor = VARIANTS[name]
    if not machine.gpu and name != "plain fp32":
        pytest.skip("needs a GPU")
    if machine.gpu and torch.cuda.get_device_properties(0).total_memory < LARGE.get(name, 0) * 2**30:
        pytest.skip(f"needs a GPU with {LARGE[name]} GiB")
    size = 4 if not machine.gpu else 32 if name == "plain fp32" else 128         # (where 128 images take over a minute)
    rows = run_training(tmp_path, teacher, changes, size, min(micro_batch, size), steps=4, gpus=machine.gpu and 1,
                        factor=factor)
    speed = median_speed(rows)
    numbers = {"ms": 1e3 / speed, "images_per_s": speed}
    if machine.gpu:
        tflop_s = speed * TFLOP_PER_IMAGE
        numbers |= {"tflop_s": tflop_s, "share_of_product": tflop_s / machine.product_tflop_s,
                    "peak_gib": rows[-1]["peak_gib"]}
    record("training step, ms an image", name, numbers)


@pytest.mark.parametrize("gib, micro_batch", [(24, 8), (16, 2)], ids=["24 GB card", "16 GB card"])
def test_small_card(gib, micro_batch, teacher, machine, record, tmp_path):
    """configs/sd15-24gb.json and sd15-16gb.json: the optimizer's state in host memory, activations computed again."""
    if not machine.gpu:
        pytest.skip("needs a GPU")
    rows = run_training(tmp_path, teacher, {}, 128, micro_batch, steps=3, gpus=1, config=f"sd15-{gib}gb")
    record("SD 1.5 on small cards, global batch 128", f"{gib} GB card", {"images_per_s": median_speed(rows),
           "peak_gib": rows[-1]["peak_gib"], "reserved_gib": rows[-1]["reserved_gib"]})
    assert rows[-1]["reserved_gib"] + 0.6 < gib              # (CUDA takes its own .6)
