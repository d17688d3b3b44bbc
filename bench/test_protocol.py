"""The whole COCO-30k protocol through `sidfast evaluate`: prompts to pixels, Inception's features and CLIP's, FID.

On a GPU with SD 1.5's architecture in one step, Inception-v3 and the CLIP ViT-L/14, all with random weights, 30,000
images at 512 px; on a CPU the embedded teacher and its small CLIP, a few images. Start-up counts.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from random_judges import write_clip, write_inception

from sidfast.data.prompts import open_prompts
from sidfast.publishing.export import write_export
from sidfast.teachers.load import load_teacher
from sidfast.teachers.random_init import write_random_teacher

ROOT = Path(__file__).parents[1]


def write_prompts(folder, n):
    prompts = open_prompts("shapes:train", seed=0)
    (folder / "prompts.txt").write_text("".join(f"{prompts[i]}\n" for i in range(n)))


def write_statistics(folder, dimension):
    """A reference: any mean and covariance will do for the time that a FID takes."""
    np.savez(folder / "reference.npz", mu=np.zeros(dimension), sigma=np.eye(dimension))


@pytest.fixture(scope="session")
def parts(machine, tmp_path_factory):
    """{option: value} of the command, without --out."""
    folder = tmp_path_factory.mktemp("protocol")
    write_prompts(folder, 30_000 if machine.gpu else 150)
    common = {"--prompts": folder / "prompts.txt", "--reference": folder / "reference.npz",
              "--cache": folder / "cache", "--model": folder / "export"}
    teacher, clip = ROOT / "assets" / "teacher", ROOT / "assets" / "clip"
    if not machine.gpu:
        write_statistics(folder, 128)
        features = {"--features": f"clip:{clip}", "--clip": clip}
    else:
        teacher = folder / "teacher"
        write_random_teacher("sd15", teacher, machine.device)
        write_statistics(folder, 2048)
        features = {"--features": f"inception:{write_inception(folder / 'inception.pth')}",
                    "--clip": write_clip(folder / "clip"), "--resize": 256, "--dtype": "bf16"}
    loaded = load_teacher(str(teacher))
    write_export(loaded.one_step_pipeline(loaded.network, 625), folder / "export")
    return common | features


@pytest.mark.parametrize("implementation", ("fused", "plain"))
def test_protocol(implementation, parts, machine, record, tmp_path):
    if implementation == "fused" and not machine.gpu:
        pytest.skip("needs a GPU")
    if implementation == "plain" and machine.gpu:
        pytest.skip("test_sample.py compares the two")
    command = [sys.executable, "-m", "sidfast.cli", "evaluate", "--out", str(tmp_path / "result.json"),
               *(str(word) for pair in parts.items() for word in pair)]
    command += ["--fused", "--tf32", "--batch-size", "50"] if implementation == "fused" else []
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert all(np.isfinite(v) for v in result["metrics"].values())
    record(f"COCO-30k protocol, {result['images']} images", implementation, {
        "ms": 1e3 * seconds / result["images"], "minutes": seconds / 60, "images_per_s": result["images"] / seconds})
