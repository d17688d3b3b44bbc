"""Two GPUs against one, and what sharding saves: SD 1.5 with random weights through the trainer, bf16, fused.

ZeRO 2 on one GPU and on two with a global batch of 256: images/s, and the same losses; peak memory of ZeRO 0 and 3. And
what the GPUs of this machine send to one another, for the estimates of docs/scaling.md.
"""

import os
import time

import pytest
import torch
from test_step import teacher  # noqa: F401 (a fixture)
from training import free_port, median_speed, run_training


def zero(stage, **options):
    return {"deepspeed": {"bf16": {"enabled": True}, "zero_optimization": {"stage": stage, **options}}}


# Stage 3 as it is set where memory is short: weights are given back once a block has used them, buckets are small.
SHARDED = {"stage3_max_live_parameters": 1e8, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 2e7,
           "reduce_bucket_size": 5e7}


@pytest.fixture(autouse=True)
def two_gpus():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")


def test_two_gpus(teacher, record, tmp_path):  # noqa: F811
    curves = {}
    for gpus in (1, 2):
        rows = run_training(tmp_path / str(gpus), teacher, zero(2), 256, 8, steps=4, gpus=gpus)
        speed = median_speed(rows)
        curves[gpus] = [(row["fake_score_loss"], row["generator_loss"]) for row in rows]
        record("SD 1.5, ZeRO 2, global batch 256, ms an image", f"{gpus} GPUs", {
            "ms": 1e3 / speed, "images_per_s": speed, "peak_gib": rows[-1]["peak_gib"],
            "reserved_gib": rows[-1]["reserved_gib"]})
    for (fake, generator), (fake_2, generator_2) in zip(*curves.values(), strict=True):
        assert fake_2 == pytest.approx(fake, rel=0.02) and generator_2 == pytest.approx(generator, rel=0.1, abs=5)


@pytest.mark.parametrize("micro_batch", (2, 4))
def test_sharding_saves_memory(micro_batch, teacher, record, tmp_path):  # noqa: F811
    peaks = {}
    for stage, options in ((0, {}), (3, SHARDED)):
        rows = run_training(tmp_path / str(stage), teacher, zero(stage, **options), 8, micro_batch, steps=3, gpus=2)
        peaks[stage] = rows[-1]["peak_gib"]
        record(f"SD 1.5, two GPUs, micro-batch {micro_batch}", f"ZeRO {stage}", {
            "images_per_s": median_speed(rows), "peak_gib": peaks[stage], "reserved_gib": rows[-1]["reserved_gib"]})
    if micro_batch == 2:                                 # (what is not sharded, activations, grows with it)
        assert peaks[3] <= 0.65 * peaks[0]


def test_bandwidth(record):
    """Of a sum over all GPUs of as many bytes as SD 1.5's gradients have in bf16."""
    port, gpus = free_port(), torch.cuda.device_count()
    seconds = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(_sum_up, (gpus, port, seconds), gpus)
    size, took = _ELEMENTS * 2, seconds.get()
    record(f"all-reduce over {gpus} GPUs", "NCCL", {"ms": 1e3 * took, "gb": size / 1e9,
                                                    "sent_gb_s": 2 * (gpus - 1) / gpus * size / took / 1e9})


_ELEMENTS = 859_520_964


def _sum_up(rank, gpus, port, seconds):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.cuda.set_device(rank)
    torch.distributed.init_process_group("nccl", rank=rank, world_size=gpus)
    gradients, taken = torch.ones(_ELEMENTS, dtype=torch.bfloat16, device="cuda"), []
    for _ in range(8):
        torch.distributed.barrier()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        torch.distributed.all_reduce(gradients)
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - begin)
    if rank == 0:
        seconds.put(sorted(taken)[len(taken) // 2])
    torch.distributed.destroy_process_group()
