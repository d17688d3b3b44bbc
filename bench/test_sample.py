"""Prompts to pixels in one step, text encoder and VAE included: diffusers' networks against the fused ones.

On a GPU SD 1.5's architecture with random weights at 512 px in bf16; on a CPU the embedded teacher's.
"""

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from harness import free, seconds

from sidfast.accel.pipeline import fuse_pipeline
from sidfast.evaluation.evaluate import pipeline_generator
from sidfast.teachers.sd import StableDiffusion
from sidfast.teachers.sd_pipeline import OneStepPipeline
from sidfast.teachers.tokenizer import build_tokenizer

TEACHER = Path(__file__).parents[1] / "assets" / "teacher"


def pipeline(machine):
    if not machine.gpu:
        from sidfast.teachers.load import load_teacher

        teacher = load_teacher(str(TEACHER))
        return teacher.one_step_pipeline(teacher.network, 625)
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 77
    torch.manual_seed(0)
    with torch.device(machine.device):
        parts = StableDiffusion().build("sd15", **{
            name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")})
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    return OneStepPipeline(**parts, tokenizer=tokenizer, scheduler=scheduler).to(machine.device, machine.dtype)


@pytest.mark.parametrize("implementation", ("fused", "plain"))
def test_sample(implementation, machine, record):
    if implementation == "fused" and not machine.gpu:
        pytest.skip("needs a GPU")
    n, batches = (16, 4) if machine.gpu else (2, 1)
    free()
    pipe = pipeline(machine)
    if implementation == "fused":
        fuse_pipeline(pipe, n, "benchmark")
    generate = pipeline_generator(pipe)

    def sample():
        for k in range(batches):
            generate(["a red circle on a blue background"] * n, range(k * n, (k + 1) * n))

    ms = 1e3 * seconds(sample, machine.device, rounds=3) / (n * batches)
    numbers = {"ms": ms, "images_per_s": 1e3 / ms}
    if machine.gpu:
        numbers["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    record(f"one-step sampling, batch {n}, ms an image", implementation, numbers)
