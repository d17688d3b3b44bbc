"""Timing, ceilings and gates. Every gate is a ratio between two things measured in the same run."""

import gc
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from sidfast.accel.graphs import GraphedStep

GATES = Path(__file__).with_name("gates.json")


@dataclass(frozen=True)
class Machine:
    """Where the benchmarks run, and its ceilings as measured in this run."""

    device: torch.device
    name: str
    copy_gb_s: float                                     # of a large copy, bytes read and written
    product_tflop_s: float                               # of a large square product in `dtype`
    dtype: torch.dtype

    @property
    def gpu(self):
        return self.device.type == "cuda"


def find_machine():
    """The GPU, or else the CPU, with its ceilings."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    dtype = torch.bfloat16 if gpu else torch.float32
    x = torch.empty(2**29 if gpu else 2**24, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    copy = 2 * x.numel() / seconds(lambda: y.copy_(x), device) / 1e9
    side = 8192 if gpu else 512
    a = torch.randn(side, side, device=device, dtype=dtype)
    product = 2 * side**3 / seconds(lambda: a @ a, device) / 1e12
    return Machine(device, torch.cuda.get_device_name() if gpu else "CPU", copy, product, dtype)


def seconds(function, device, rounds=10):
    """Median seconds of a call, after two warm-up calls."""
    times = []
    for _ in range(rounds + 2):
        wait(device)
        start = time.perf_counter()
        function()
        wait(device)
        times.append(time.perf_counter() - start)
    return sorted(times[2:])[rounds // 2]


def compiled_blocks(step):
    """How many pieces of code a call of `step` runs that torch.compile made, after a call that has it make them."""
    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    return sum(event.count for event in profiled.key_averages() if event.key.startswith("Torch-Compiled Region"))


def wait(device):
    """Until the device has done everything asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def repeated(step, machine, times):
    """A callable that runs `step` `times` times and waits: on a GPU as one CUDA graph, without launch overhead."""

    def many():
        for _ in range(times):
            step()

    graphed = GraphedStep(many, machine.device) if machine.gpu else many

    def run():
        graphed()
        wait(machine.device)

    return run


def free():
    """Give memory of earlier benchmarks back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def load_gates(path=GATES):
    """The list of gates: {"group", "fast", "slow", "ratio"} or {"group", "fast", "share_of_copy"}; "where": device;
    "file": of the benchmark that measures it."""
    return json.loads(Path(path).read_text())


def check_gates(results, gates, where):
    """[(gate, what was measured, whether it holds)] of the gates whose benchmarks ran.

    results: {group: {implementation: {"ms", "share_of_copy", ...}}}; `where`: "cuda" or "cpu". Slow: at least `ratio`
    times the milliseconds of fast; a list of slow ones stands for the best of them.
    """
    checked = []
    for gate in gates:
        group = results.get(gate["group"], {})
        if gate["where"] != where or gate["fast"] not in group:
            continue
        fast = group[gate["fast"]]
        if "share_of_copy" in gate:
            checked.append((gate, fast["share_of_copy"], fast["share_of_copy"] >= gate["share_of_copy"]))
            continue
        others = [group[name]["ms"] for name in _names(gate["slow"]) if name in group]
        if others:
            ratio = min(others) / fast["ms"]
            checked.append((gate, ratio, ratio >= gate["ratio"]))
    return checked


def missing(results, gates, where):
    """[(gate, its implementations that were not measured)] of the gates that lack some."""
    found = [(gate, [name for name in (gate["fast"], *_names(gate.get("slow", ()))) if name not in results.get(
        gate["group"], {})]) for gate in gates if gate["where"] == where]
    return [(gate, names) for gate, names in found if names]


def _names(value):
    return [value] if isinstance(value, str) else value
