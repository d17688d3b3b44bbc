"""Compile every kernel for a generation of GPUs, without a GPU: `python tests/compile_kernels.py 90`.

Launches are replaced by Triton's own warm-up, which compiles for exactly the arguments of the launch. Prints a line of
JSON for each kernel: its name, registers of a thread, bytes of a thread on the stack (registers that did not fit),
bytes of shared memory, and how many fused multiply-adds take a summand from another thread: a sum of products that each
thread rounds in its own way, so that which of them is stored is chance.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from sidfast.common.environment import prepare_environment

prepare_environment()

import torch  # noqa: E402
import triton  # noqa: E402
from sidfast.kernels import accumulate, backend  # noqa: E402
from sidfast.kernels.channel_stats import add_channel_stats, column_sums  # noqa: E402
from sidfast.kernels.fake_score_loss import fake_score_loss  # noqa: E402
from sidfast.kernels.geglu import geglu, geglu_backward  # noqa: E402
from sidfast.kernels.group_norm import group_norm  # noqa: E402
from sidfast.kernels.layer_norm import layer_norm, layer_norm_forward  # noqa: E402
from sidfast.kernels.noising import add_noise  # noqa: E402
from sidfast.kernels.sid_loss import sid_loss  # noqa: E402
from sidfast.kernels.upsample import combine_taps, interleave, separate, separate_taps  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_compiled = {}


class Driver:
    """The part of Triton's driver that compiling needs."""

    def __init__(self, generation):
        self.target = GPUTarget("cuda", generation, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_only(run):
    def compile_once(function, *args, grid, warmup, **options):
        kernel = run(function, *args, grid=grid, warmup=True, **options)
        _compiled[kernel.hash] = f"{function.fn.__module__.split('.')[-1]}.{function.__name__}", kernel

    return compile_once


def usage(kernel):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([_CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True,
                              check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))
    return {"registers": registers, "stack": stack, "shared": kernel.metadata.shared,
            "fused_across": fused_across(kernel.asm["ptx"])}


def fused_across(ptx):
    from_others = set(re.findall(r"shfl\.sync\.bfly\.b32\s+(%\w+)", ptx))
    return sum(not from_others.isdisjoint(operands.split(", ")) for operands in re.findall(
        r"fma\.rn\.f32\s+%\w+, ([^;]+);", ptx))


def all_gradients(outputs, *inputs):
    torch.autograd.grad([y for y in outputs if y.requires_grad], inputs,
                        [torch.ones_like(y) for y in outputs if y.requires_grad], allow_unused=True)


def launch_everything(dtype):
    """Every kernel in every mode, on the widths of Stable Diffusion 1.5."""

    def draw(*shape, like=dtype):
        return torch.randn(shape, dtype=like).requires_grad_()

    single, (a, s) = torch.float32, torch.rand(2, 2)
    for sizes in ([5000], [320] * 32, [3, 1, 2560]):
        accumulate.launch([torch.zeros(n) for n in sizes], [torch.zeros(n, dtype=dtype) for n in sizes],
                          torch.tensor(True))
    for k in (1, 2):                                     # without and with a doubled batch
        x_g, x_t = draw(2, 4, 64, 64, like=single), draw(2, 4, 64, 64, like=single)
        o_real, o_fake = draw(2 * k, 4, 64, 64), draw(2 * k, 4, 64, 64)
        all_gradients(sid_loss(x_g, x_t, o_real, o_fake, a, s, 1.5, 2.0, 1.5, 1.2)[:1], x_g, x_t, o_real, o_fake)
        all_gradients(fake_score_loss(o_fake, x_t.detach(), a, 1.5)[:1], o_fake)
        all_gradients(add_noise(x_g, x_t.detach(), a, s, k, dtype), x_g)
    for width, skip in ((320, 0), (640, 320), (1280, 1280)):
        x, other = draw(1, 16, 16, width), draw(1, 16, 16, skip) if skip else None
        weight, bias, shift = draw(width + skip), draw(width + skip), draw(1, width + skip)
        inputs = [v for v in (x, weight, bias, other, shift) if v is not None]
        all_gradients(group_norm(x, weight, bias, 32, silu=True, shift=shift, other=other)[:1], *inputs)
        all_gradients(group_norm(x, weight, bias, 32, other=other)[:1], x)
        all_gradients(layer_norm(x, weight[:width], bias[:width], residual=x.detach()), x, weight, bias)
        all_gradients(layer_norm(x, weight[:width].detach(), bias[:width].detach())[1:], x)
        with torch.no_grad():
            add_channel_stats(x, x, bias[:width])
            add_channel_stats(x, bias=bias[:width])
            for residual in (None, x):
                layer_norm_forward(x, weight[:width], bias[:width], 1e-5, residual, bias[:width])
            column_sums(x.flatten(0, -2))
            column_sums(x.flatten(0, -2), dtype)
            interleave(draw(2, 9, 9, 4 * width), bias[:width])
            separate(draw(2, 16, 16, width))
            separate_taps(combine_taps(draw(16, width, 3, 3)))
            geglu_backward(draw(64, 4 * width), draw(64, 8 * width), sums_type=torch.float32)
        up = draw(64, 8 * width)
        all_gradients([geglu(up)], up)
    for width in (8, 12, 66):                            # nothing that 16 bytes divide: an element a thread
        x, weight, bias = draw(3, 5, width), draw(width), draw(width)
        all_gradients(layer_norm(x, weight, bias, residual=x.detach()), x, weight, bias)
        all_gradients(group_norm(x, weight, bias, 2, silu=True)[:1], x, weight, bias)
        all_gradients([geglu(x)], x)


if __name__ == "__main__":
    backend.INTERPRETED = True                           # the public functions take tensors on the CPU
    triton.runtime.driver.set_active(Driver(int(sys.argv[1])))
    triton.runtime.jit.JITFunction.run = compile_only(triton.runtime.jit.JITFunction.run)
    for dtype in (torch.bfloat16, torch.float32):
        launch_everything(dtype)
    for name, kernel in _compiled.values():
        print(json.dumps({"kernel": name} | usage(kernel)))
