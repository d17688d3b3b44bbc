"""Where the time of a pass goes: milliseconds of GPU kernels by kind.

`python bench/breakdown.py RUN/profile/trace-1-steps.json` prints it for a trace of training (`--profile`).
"""

import json
import re
import sys
from pathlib import Path

import torch
from harness import wait
from torch.profiler import ProfilerActivity, profile

# The first pattern that a kernel's name contains decides; names are cuDNN's, cuBLAS', PyTorch's and our own.
KINDS = {
    "attention": r"flash|fmha|sdpa|mha_|attention|softmax|compute_dot_do_o|convert_dq",
    "normalisation": r"group_?norm|layer_?norm|channel_stats|RowwiseMoments|GammaBeta|ComputeInternalGradients|"
                     r"ComputeBackwardFusedParams",
    "layout": r"nchwToNhwc|nhwcToNchw|convertTensor|transpose|_separate_kernel",
    "convolution": r"conv|wgrad|dgrad|fprop|winograd|implicit|cudnn.*xmma",
    "matrix products": r"gemm|nvjet|cublas|cutlass|splitK|xmma",
    "losses": r"sid_loss|fake_score|add_noise",
    "activation": r"geglu|gelu|silu|sigmoid",
    "copies": r"copy|CatArray|Memcpy|Memset|\bfill",
    "reductions": r"reduce|column_sums|sum_rows|accumulate",
}
FLOOR = ("convolution", "matrix products", "attention")  # what tensor cores do


def kind_of(kernel):
    """The kind of a GPU kernel by its name; "elementwise and other" if no pattern fits."""
    for kind, pattern in KINDS.items():
        if re.search(pattern, kernel, re.IGNORECASE):
            return kind
    return "elementwise and other"


def time_by_kind(step, device, rounds=3):
    """{kind: milliseconds of a call of `step`}, the largest first, after two calls to warm up. Needs a GPU."""
    for _ in range(2):
        step()
    wait(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(rounds):
            step()
        wait(device)
    times = {}
    for event in profiled.key_averages():
        if event.device_type == torch.autograd.DeviceType.CUDA and event.self_device_time_total:
            kind = kind_of(event.key)
            times[kind] = times.get(kind, 0) + event.self_device_time_total / rounds / 1e3
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def trace_by_kind(path):
    """The same of a Chrome trace that PyTorch's profiler wrote: {kind: milliseconds}; and {"busy", "span"}: those in
    which a kernel or a copy runs, and those from the first one's start to the last one's end."""
    events = [e for e in json.loads(Path(path).read_text())["traceEvents"]
              if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    events.sort(key=lambda e: e["ts"])
    times, busy, end = {}, 0.0, events[0]["ts"]
    for e in events:
        kind, until = kind_of(e["name"]), e["ts"] + e["dur"]
        times[kind] = times.get(kind, 0) + e["dur"] / 1e3
        busy += max(0.0, until - max(e["ts"], end))
        end = max(end, until)
    return dict(sorted(times.items(), key=lambda item: -item[1])), {
        "busy": busy / 1e3, "span": (end - events[0]["ts"]) / 1e3}


if __name__ == "__main__":
    for part in reversed(trace_by_kind(sys.argv[1])):
        for name, value in part.items():
            print(f"{name:<24}{value:10.2f} ms")
