"""Where the time of a pass goes: milliseconds of GPU kernels by kind."""

import re

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
    "reductions": r"reduce|column_sums|sum_rows",
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
