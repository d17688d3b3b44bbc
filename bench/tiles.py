"""Which tiles of the memory-bound backward kernels are fastest: `python bench/tiles.py`. Needs a GPU.

For each kernel, the milliseconds of all its launches in a backward pass of SD 1.5's UNet (16 rows, bf16), by the
settings of its tiles, the fastest first, with its rate as a share of a copy's. A line a setting; each list of settings
begins with what the kernel is launched with now, which is marked.
"""

import argparse
import itertools

import torch
import triton
from harness import find_machine, seconds
from sidfast.kernels import channel_stats, group_norm, layer_norm
from sidfast.kernels.backend import UNFUSED, share

# What of each a pass launches: {(rows, channels): how often}, {(positions, channels, of all, SiLU): how often}.
LAYER_NORMS = {(65536, 320): 15, (16384, 640): 15, (4096, 1280): 15, (1024, 1280): 3}
COLUMNS = {(65536, 320): 16, (65536, 640): 1, (16384, 640): 15, (16384, 1280): 2, (4096, 1280): 17, (1024, 1280): 10}
GROUP_NORMS = {(4096, 320, 320, True): 8, (4096, 320, 640, True): 5, (4096, 640, 960, True): 1,
               (4096, 320, 320, False): 5, (1024, 640, 640, True): 6, (1024, 640, 1280, True): 3,
               (1024, 640, 640, False): 5, (1024, 1280, 1920, True): 1, (256, 1280, 1280, True): 6,
               (256, 1280, 2560, True): 4, (256, 1280, 1280, False): 5, (64, 1280, 1280, True): 11,
               (64, 1280, 2560, True): 6}
N = 16
ROUNDS = 10                                              # launches in a graph


def layer_norm_settings(affine):
    """Elements of a tile, warps, programs a multiprocessor, stages of the loop."""
    fewer, now = (4, 8) if affine else (8, 16)
    return [(2048, 4, now, 1), *itertools.product((1024, 2048), (4,), (fewer, now), (2, 3)),
            (2048, 8, 4, 3), (2048, 8, 8, 3), (4096, 8, 4, 1), (4096, 8, 4, 2), (1024, 4, 8, 1), (2048, 4, 4, 1)]


def layer_norm_backward(shape, setting, affine, device):
    """(launch, bytes) of one."""
    (T, C), (elements, warps, density, stages) = shape, setting
    dy, h, residual, dh = (torch.randn(T, C, device=device, dtype=torch.bfloat16) for _ in range(4))
    mean, rstd = torch.zeros(T, device=device), torch.ones(T, device=device)
    BC = triton.next_power_of_2(C)
    BT = max(1, elements // BC)
    programs, blocks = share(triton.cdiv(T, BT), device, density=density)
    sums = torch.empty(programs, 3, C, device=device)

    def launch():
        layer_norm._layer_norm_backward_kernel[(programs,)](
            p_dy=dy, p_h=h, p_mean=mean, p_rstd=rstd, p_weight=dy[0], p_residual=residual, p_dh=dh, p_sums=sums, T=T,
            C=C, blocks=blocks, ADD=True, AFFINE=affine, STAGES=stages, BT=BT, BC=BC, num_warps=warps, **UNFUSED)
        if affine:
            channel_stats.sum_rows(sums.flatten(1), torch.bfloat16)

    return launch, 4 * 2 * T * C


def column_settings():
    """Rows and channels of a tile, warps, programs a multiprocessor, stages of the loop."""
    return [(64, 64, 4, 16, 1), *itertools.product((32, 64), (64, 128), (4,), (4, 8, 16), (1, 3)), (128, 64, 8, 8, 1),
            (64, 128, 8, 4, 3)]


def column_sums(shape, setting, device):
    """(launch, bytes) of one."""
    (T, C), (BT, BC, warps, density, stages) = shape, setting
    x = torch.randn(T, C, device=device, dtype=torch.bfloat16)
    columns = triton.cdiv(C, BC)
    programs, blocks = share(triton.cdiv(T, BT), device, columns, density)
    sums = torch.empty(programs, C, device=device)

    def launch():
        channel_stats._column_sums_kernel[(columns, programs)](
            p_x=x, p_sums=sums, T=T, C=C, blocks=blocks, STAGES=stages, BT=BT, BC=BC, num_warps=warps)
        channel_stats.sum_rows(sums, torch.bfloat16)

    return launch, 2 * T * C


def _group_norm_tensors(shape, device):
    S, C1, C, silu = shape
    x, dx, residual = (torch.randn(N, S, C1, device=device, dtype=torch.bfloat16) for _ in range(3))
    dy, bias = (torch.randn(*s, C, device=device, dtype=torch.bfloat16) for s in ((N, S), ()))
    channel, slope = torch.ones(N, 3, C, device=device), torch.ones(N, 2, C, device=device)
    fixed = {"p_x": x, "p_dy": dy, "p_channel": channel, "p_bias": bias, "S": S, "C1": C1, "C": C, "seam": 0,
             "SILU": silu}
    return fixed, dx, residual, slope


def sums_settings():
    """Channels of a tile, warps, chunks of a program, stages of the loop."""
    return [(64, 4, 1, 1), (64, 8, 1, 1), (128, 8, 1, 1), (64, 4, 2, 1), (64, 4, 4, 2), (64, 4, 4, 3), (64, 8, 2, 2),
            (64, 8, 4, 2), (64, 8, 4, 3), (128, 8, 4, 2), (128, 16, 4, 2)]


def group_norm_sums(shape, setting, device):
    """(launch, bytes) of one."""
    (S, C1, *_), (BC, warps, run, stages) = shape, setting
    fixed, *_ = _group_norm_tensors(shape, device)
    chunks = triton.cdiv(S, group_norm.CHUNK)
    sums = torch.empty(N, chunks, 2, C1, device=device)

    def launch():
        group_norm._group_norm_backward_sums_kernel[(triton.cdiv(C1, BC), triton.cdiv(chunks, run), N)](
            p_sums=sums, chunks=chunks, RUN=run, STAGES=stages, BS=group_norm.CHUNK, BC=BC, num_warps=warps, **fixed)

    return launch, 2 * 2 * N * S * C1


def backward_settings():
    """Positions and channels of a tile, warps."""
    return [(64, 64, 4), (32, 64, 4), (32, 128, 4), (64, 64, 8), (16, 64, 2), (128, 64, 8), (32, 64, 2), (16, 128, 4),
            (16, 256, 4)]


def group_norm_backward(shape, setting, device):
    """(launch, bytes) of one, a gradient beside it included."""
    (S, C1, *_), (BS, BC, warps) = shape, setting
    fixed, dx, residual, slope = _group_norm_tensors(shape, device)

    def launch():
        group_norm._group_norm_backward_kernel[(triton.cdiv(C1, BC), triton.cdiv(S, BS), N)](
            p_slope=slope, p_residual=residual, p_dx=dx, ADD=True, BS=BS, BC=BC, num_warps=warps, **fixed)

    return launch, 4 * 2 * N * S * C1


KERNELS = {
    "layer_norm backward": (LAYER_NORMS, layer_norm_settings(True), lambda *a: layer_norm_backward(*a[:2], True, a[2])),
    "layer_norm backward, frozen": (LAYER_NORMS, layer_norm_settings(False),
                                    lambda *a: layer_norm_backward(*a[:2], False, a[2])),
    "column_sums": (COLUMNS, column_settings(), column_sums),
    "group_norm sums": (GROUP_NORMS, sums_settings(), group_norm_sums),
    "group_norm backward": (GROUP_NORMS, backward_settings(), group_norm_backward)}


def milliseconds(launch, device):
    """Of a launch, in a CUDA graph of several."""
    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(ROUNDS):
            launch()
    return seconds(graph.replay, device, 5) / ROUNDS * 1e3


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=KERNELS, metavar="KERNEL", help=f"of {', '.join(KERNELS)}")
    chosen = parser.parse_args(argv).only or KERNELS
    if not torch.cuda.is_available():
        parser.error("needs a GPU")
    machine = find_machine()
    print(f"{machine.name}, a copy {machine.copy_gb_s:.0f} GB/s", flush=True)
    for name in chosen:
        shapes, settings, prepare = KERNELS[name]
        rows = []
        for setting in dict.fromkeys(settings):
            each, total, least = [], 0.0, 0
            for shape, times in shapes.items():
                launch, size = prepare(shape, setting, machine.device)
                each.append(milliseconds(launch, machine.device))
                total, least = total + times * each[-1], least + times * size
            rows.append((total, setting, least / total / 1e6 / machine.copy_gb_s, each))
        print(f"\n{name}: ms of a pass, share of a copy, us of each shape")
        for total, setting, rate, each in sorted(rows):
            mark = " <- now" if setting == settings[0] else ""
            print(f"  {setting!s:<24}{total:7.3f}{rate:6.2f}  {' '.join(f'{1e3 * ms:.1f}' for ms in each)}{mark}",
                  flush=True)


if __name__ == "__main__":
    main()
