"""Each kernel against plain PyTorch, as written and compiled: time, bandwidth, share of a copy's bandwidth."""

import eager
import pytest
import torch
from sidfast.kernels import upsample
from sidfast.kernels.accumulate import accumulate, accumulate_reference
from sidfast.kernels.channel_stats import add_channel_stats, add_channel_stats_reference, column_sums
from sidfast.kernels.fake_score_loss import fake_score_loss, fake_score_loss_reference
from sidfast.kernels.geglu import geglu
from sidfast.kernels.group_norm import group_norm
from sidfast.kernels.layer_norm import layer_norm
from sidfast.kernels.noising import add_noise, add_noise_reference
from sidfast.kernels.sid_loss import sid_loss, sid_loss_reference

IMPLEMENTATIONS = ("fused", "eager", "compiled")


def latents(machine, *rows):
    shape = (4, 128, 128) if machine.gpu else (4, 16, 16)
    n = 64 if machine.gpu else 2
    return n, [torch.randn(k * n, *shape, device=machine.device) for k in rows]


def pick(implementation, fused, plain, machine):
    if implementation == "compiled" and not machine.gpu:
        pytest.skip("compiling takes longer than the benchmark here")
    return {"fused": fused, "eager": plain, "compiled": torch.compile(plain) if machine.gpu else None}[implementation]


def size(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", ("forward", "forward and backward"))
def test_sid_loss(timed, machine, direction, implementation):
    n, (x_g, x_t, o_real, o_fake) = latents(machine, 1, 1, 2, 2)
    A, B = (torch.rand(n, device=machine.device) for _ in range(2))
    f = pick(implementation, sid_loss, sid_loss_reference, machine)
    measure(timed, machine, "sid_loss", direction, implementation,
            lambda *x: f(*x, A, B, 1.5, 1.5, 1.5, 1.0)[0], [x_g, x_t, o_real, o_fake])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", ("forward", "forward and backward"))
def test_fake_score_loss(timed, machine, direction, implementation):
    n, (output, target) = latents(machine, 2, 1)
    w = torch.rand(n, device=machine.device)
    f = pick(implementation, fake_score_loss, fake_score_loss_reference, machine)
    measure(timed, machine, "fake_score_loss", direction, implementation, lambda o: f(o, target, w, 1.5)[0], [output],
            beside=[target])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", ("forward", "forward and backward"))
def test_add_noise(timed, machine, direction, implementation):
    n, (x, eps) = latents(machine, 1, 1)
    a, s = (torch.rand(n, device=machine.device) for _ in range(2))
    f = pick(implementation, add_noise, add_noise_reference, machine)
    measure(timed, machine, "add_noise", direction, implementation, lambda x: f(x, eps, a, s, 2, torch.float32)[1],
            [x], beside=[eps])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", ("forward", "forward and backward"))
def test_group_norm(timed, machine, direction, implementation):
    shape = (16, 64, 64, 320) if machine.gpu else (1, 8, 8, 32)
    x = torch.randn(shape, device=machine.device, dtype=machine.dtype)
    weight, bias = torch.randn(2, shape[-1], device=machine.device, dtype=machine.dtype)
    fused = lambda x, w, b: group_norm(x, w, b, 32, silu=True)[0]        # noqa: E731
    f = pick(implementation, fused, eager.group_norm(32, True), machine)
    measure(timed, machine, "group_norm with SiLU", direction, implementation, f, [x, weight, bias])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", ("forward", "forward and backward"))
def test_layer_norm(timed, machine, direction, implementation):
    shape = (16 * 4096, 320) if machine.gpu else (64, 32)
    x, residual = (torch.randn(shape, device=machine.device, dtype=machine.dtype) for _ in range(2))
    weight, bias = torch.randn(2, shape[-1], device=machine.device, dtype=machine.dtype)
    f = pick(implementation, layer_norm, eager.layer_norm, machine)
    measure(timed, machine, "layer_norm with residual", direction, implementation,
            lambda x, w, b, r: f(x, w, b, residual=r)[1], [x, weight, bias, residual], writes=2, added=residual)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", ("forward", "forward and backward"))
def test_geglu(timed, machine, direction, implementation):
    shape = (16 * 4096, 2560) if machine.gpu else (64, 64)
    x = torch.randn(shape, device=machine.device, dtype=machine.dtype)
    f = pick(implementation, geglu, eager.geglu, machine)
    measure(timed, machine, "geglu", direction, implementation, f, [x])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_add_channel_stats(timed, machine, implementation):
    shape = (16, 64, 64, 320) if machine.gpu else (1, 8, 8, 32)
    if implementation == "fused" and not machine.gpu:
        pytest.skip("the kernel itself needs a GPU")
    x, residual = (torch.randn(shape, device=machine.device, dtype=machine.dtype) for _ in range(2))
    bias = torch.randn(shape[-1], device=machine.device, dtype=machine.dtype)
    f = pick(implementation, add_channel_stats, add_channel_stats_reference, machine)
    timed(f"add_channel_stats {list(shape)}, forward", implementation, lambda: f(x, residual, bias),
          20 if machine.gpu else 1, least_bytes=size(x, residual, x))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_column_sums(timed, machine, implementation):
    shape = (16 * 1024, 1280) if machine.gpu else (256, 32)
    measure_alone(timed, machine, "column_sums", implementation, column_sums, lambda x: x.sum(0), shape)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ("interleave", "separate", "combine_taps", "separate_taps"))
def test_upsample(timed, machine, name, implementation):
    """What makes a 2x2 convolution an upsampling 3x3 one: images and weights, forward and backward."""
    side, channels = (32, 1280) if machine.gpu else (4, 32)
    shape = {"interleave": (16, side + 1, side + 1, 4 * channels), "separate": (16, 2 * side, 2 * side, channels),
             "combine_taps": (channels, channels, 3, 3), "separate_taps": (4 * channels, channels, 2, 2)}[name]
    measure_alone(timed, machine, name, implementation, getattr(upsample, name), getattr(upsample, f"{name}_reference"),
                  shape, torch.channels_last if "taps" in name else torch.contiguous_format)


def measure_alone(timed, machine, name, implementation, kernel, plain, shape, order=torch.contiguous_format):
    """Time a host function of one tensor, which runs on a GPU alone."""
    if implementation == "fused" and not machine.gpu:
        pytest.skip("the kernel itself needs a GPU")
    x = torch.randn(shape, device=machine.device, dtype=machine.dtype).contiguous(memory_format=order)
    f, y = pick(implementation, kernel, plain, machine), plain(x)
    timed(f"{name} {list(shape)}", implementation, lambda: f(x), 20 if machine.gpu else 1, least_bytes=size(x, y))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("count, n", [(1, 2**26), (32, 320)])
def test_accumulate(timed, machine, implementation, count, n):
    n = n if machine.gpu else min(n, 2**12)
    sums, gradients = ([torch.randn(n, device=machine.device, dtype=kind) for _ in range(count)]
                       for kind in (torch.float32, machine.dtype))
    wanted = torch.tensor(True, device=machine.device)
    f = pick(implementation, accumulate, accumulate_reference, machine)
    timed(f"accumulate {count} x [{n}]", implementation, lambda: f(sums, gradients, wanted), 20 if machine.gpu else 1,
          least_bytes=size(*sums, *sums, *gradients))


def measure(timed, machine, name, direction, implementation, f, inputs, beside=(), writes=1, added=None):
    """Time f forward, or forward and backward. Least bytes: every input read once a pass, every result written once.
    An input that is `added` to another: the backward pass reads their sum alone, and has one gradient for both."""
    inputs = [v.requires_grad_() for v in inputs]
    with torch.no_grad():                                # (a graph kept alive would belong to another stream)
        y = f(*inputs)
    forward_bytes = size(*inputs, *beside) + writes * size(y)
    group, times = f"{name} {list(inputs[0].shape)}, {direction}", 20 if machine.gpu else 1
    if direction == "forward":
        def step():
            with torch.no_grad():
                f(*inputs)

        timed(group, implementation, step, times, least_bytes=forward_bytes)
    else:
        dy = torch.randn_like(y)
        distinct = [v for v in inputs if v is not added]
        backward_bytes = size(*distinct, *beside, dy, *distinct)         # read inputs and dy, write gradients
        timed(group, implementation, lambda: torch.autograd.grad(f(*inputs), inputs, dy), times,
              least_bytes=forward_bytes + backward_bytes)
