"""Kernels compile for real GPUs, which the interpreter cannot show; nothing spills out of registers, and threads that
hold the same sum hold the same bits."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, environment


@pytest.mark.slow
@pytest.mark.parametrize("generation", (80, 90), ids=["A100", "H100"])
def test_every_kernel_compiles(generation):
    done = subprocess.run([sys.executable, "tests/compile_kernels.py", str(generation)], cwd=ROOT, env=environment(0),
                          capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    source = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    assert len({k["kernel"] for k in kernels}) == source.count("_kernel(p_")               # not one left out
    spilling = [k for k in kernels if k["stack"]]
    assert not spilling, spilling
    assert not any(k["fused_across"] for k in kernels)
