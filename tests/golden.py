"""The numbers of a short fixed-seed training run on the CPU, to see that a change of the code leaves them alone.

    python tests/golden.py             train, and print them as JSON: run it before and after a refactoring
    python tests/golden.py --write     keep them in golden.json as well, which tests/test_resume.py compares with

Bits depend on the processor and on the libraries, so the numbers are kept with both. Where those are others, losses and
norms are compared within tolerances.
"""

import argparse
import hashlib
import json
import math
import platform
import re
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file

STEPS = 24
FILE = Path(__file__).with_suffix(".json")
_FIRST = 8                                               # steps after which rounding has not grown yet
_RTOL = 1e-4


def golden_config(teacher):
    """The configuration of the run, as nested dictionaries; fp32, guidance, two micro-batches, an average."""
    return {"model": {"teacher": str(teacher)}, "data": {"prompts": "shapes:train"},
            "train": {"steps": STEPS, "batch_size": 4, "micro_batch": 2, "save_every": 4, "log_every": 3,
                      "sample_every": 12, "samples": 2, "keep": 3},
            "guidance": {"kappa1": 1.5, "kappa2": 1.5, "kappa3": 1.5, "kappa4": 1.5},
            "ema": {"half_life": 3},                     # images; the ramp ends at step 15
            "optimizer": {"generator": {"lr": 1e-3}, "fake_score": {"lr": 1e-3}}}


def measure(run):
    """What is kept of the finished run in a folder."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kinds = {}
    for file in sorted((run / "checkpoints" / f"step-{STEPS:08d}").glob("*.safetensors")):
        kinds.setdefault(file.name.partition("-")[0], {}).update(load_file(file))
    for file in sorted((run / "export").rglob("*.safetensors")):
        kinds.setdefault(f"export/{file.parent.name}", {}).update(load_file(file))
    return {"origin": origin(), "losses": {str(line["step"]): [line["fake_score_loss"], line["generator_loss"]]
                                           for line in lines},
            "tensors": {kind: describe(tensors) for kind, tensors in kinds.items()}}


def describe(tensors):
    """{"sha256" of names and bits, "norm"} of named tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    norm = torch.stack([t.double().norm() for t in tensors.values()]).norm()
    return {"sha256": digest.hexdigest(), "norm": norm.item()}


def origin():
    """What the bits depend on."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().partition("\n\n")[0] if about.exists() else ""
    processor = re.findall(r"^(?:cpu family|model|model name)\s*: (.*)$", lines, re.MULTILINE)
    libraries = {name: version(name) for name in ("torch", "diffusers", "transformers", "deepspeed")}
    return libraries | {"processor": ", ".join(processor) or platform.machine(),
                        "capability": torch.backends.cpu.get_cpu_capability()}


def compare(got, want):
    """(whether bits were compared, the differences in words) of two results of `measure`."""
    exact, differences = got["origin"] == want["origin"], []

    def check(what, a, b, tolerance=None):
        if a != b and (exact or tolerance is None or abs(a - b) > tolerance * abs(b)):
            differences.append(f"{what}: {a} is not {b}")

    for part in ("losses", "tensors"):
        check(f"names of {part}", sorted(got[part]), sorted(want[part]))
    for step, losses in want["losses"].items():
        for name, a, b in zip(("fake score", "generator"), got["losses"].get(step, ()), losses, strict=False):
            if exact or int(step) <= _FIRST:
                check(f"loss of the {name}, step {step}", a, b, _RTOL)
    for kind, entry in want["tensors"].items():
        for key in ("sha256", "norm") if exact else ("norm",):
            check(f"{key} of {kind}", got["tensors"].get(kind, {}).get(key, math.nan), entry[key], _RTOL)
    return exact, differences


def train():
    """`measure` of a run in a temporary folder."""
    from conftest import start_launcher
    from tiny import write_tiny_teacher

    with tempfile.TemporaryDirectory() as folder:
        config, out = Path(folder) / "config.json", Path(folder) / "run"
        config.write_text(json.dumps(golden_config(write_tiny_teacher(Path(folder) / "teacher"))))
        process = start_launcher("sidfast/train.py", "--config", config, "--out", out, port=29727)
        _, errors = process.communicate()
        if process.returncode:
            sys.exit(errors)
        return measure(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"keep the numbers in {FILE.name}")
    arguments, result = parser.parse_args(), json.dumps(train(), indent=1)
    print(result)
    if arguments.write:
        FILE.write_text(result + "\n")
