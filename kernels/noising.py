"""Noising (method.md, eq. 1), straight into what the networks read: x_t = a x + s eps, and copies of it in their type.

Guidance runs a network on a doubled batch [x_t; x_t]: writing both halves here, cast, saves a cat and a cast each time.
Backward: dx = a (dx_t + sum of the copies' gradients).
"""

import torch
import triton
import triton.language as tl
from sidfast.kernels.backend import flat_like, require_shapes, triton_runs_on

_BLOCK = 2048                                            # elements of a sample per program


def add_noise_reference(x: torch.Tensor, eps: torch.Tensor, a: torch.Tensor, s: torch.Tensor, copies: int,
                        dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """See `add_noise`; plain PyTorch."""
    a, s = (v.to(x.dtype)[:, None, None, None] for v in (a, s))
    x_t = a * x + s * eps
    return x_t, x_t.to(dtype).repeat(copies, 1, 1, 1)


@triton.jit
def _add_noise_kernel(p_x, p_eps, p_a, p_s, p_x_t, p_input, N, D, COPIES: tl.constexpr, BD: tl.constexpr):
    i_n = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BD + tl.arange(0, BD)
    m = o < D
    b_x = tl.load(p_x + i_n * D + o, mask=m, other=0.0).to(tl.float32)
    b_eps = tl.load(p_eps + i_n * D + o, mask=m, other=0.0).to(tl.float32)
    b_x_t = tl.load(p_a + i_n).to(tl.float32) * b_x + tl.load(p_s + i_n).to(tl.float32) * b_eps
    tl.store(p_x_t + i_n * D + o, b_x_t.to(p_x_t.dtype.element_ty), mask=m)
    for copy in tl.static_range(COPIES):
        tl.store(p_input + (i_n + copy * N) * D + o, b_x_t.to(p_input.dtype.element_ty), mask=m)


@triton.jit
def _add_noise_backward_kernel(p_dx_t, p_dinput, p_a, p_dx, N, D, COPIES: tl.constexpr, BD: tl.constexpr):
    i_n = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BD + tl.arange(0, BD)
    m = o < D
    b_dx_t = tl.load(p_dx_t + i_n * D + o, mask=m, other=0.0).to(tl.float32)
    for copy in tl.static_range(COPIES):
        b_dx_t += tl.load(p_dinput + (i_n + copy * N) * D + o, mask=m, other=0.0).to(tl.float32)
    b_dx = tl.load(p_a + i_n).to(tl.float32) * b_dx_t
    tl.store(p_dx + i_n * D + o, b_dx.to(p_dx.dtype.element_ty), mask=m)


@torch.library.custom_op("sidfast::add_noise", mutates_args=())
def _add_noise(x: torch.Tensor, eps: torch.Tensor, a: torch.Tensor, s: torch.Tensor, copies: int, dtype: torch.dtype,
               ) -> tuple[torch.Tensor, torch.Tensor]:
    x, eps = flat_like(x, eps)
    N, D = x.shape[0], x[0].numel()
    x_t, network_input = _outputs(x, copies, dtype)
    _add_noise_kernel[(N, triton.cdiv(D, _BLOCK))](x, eps, a, s, x_t, network_input, N, D, COPIES=copies, BD=_BLOCK,
                                                   num_warps=8)
    return x_t, network_input


@_add_noise.register_fake
def _(x, eps, a, s, copies, dtype):
    return _outputs(flat_like(x)[0], copies, dtype)


def _outputs(x, copies, dtype):
    x_t = torch.empty_like(x)
    order = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    return x_t, torch.empty((copies * x.shape[0], *x.shape[1:]), device=x.device, dtype=dtype, memory_format=order)


@torch.library.custom_op("sidfast::add_noise_backward", mutates_args=())
def _add_noise_backward(dx_t: torch.Tensor, dinput: torch.Tensor, a: torch.Tensor, copies: int) -> torch.Tensor:
    dx_t, dinput = flat_like(dx_t, dinput)
    N, D = dx_t.shape[0], dx_t[0].numel()
    dx = torch.empty_like(dx_t)
    _add_noise_backward_kernel[(N, triton.cdiv(D, _BLOCK))](dx_t, dinput, a, dx, N, D, COPIES=copies, BD=_BLOCK,
                                                            num_warps=8)
    return dx


@_add_noise_backward.register_fake
def _(dx_t, dinput, a, copies):
    return torch.empty_like(flat_like(dx_t)[0])


def _setup(ctx, inputs, output):
    _, _, a, _, ctx.copies, _ = inputs
    ctx.save_for_backward(a)


def _backward(ctx, dx_t, dinput):
    return _add_noise_backward(dx_t, dinput, *ctx.saved_tensors, ctx.copies), None, None, None, None, None


_add_noise.register_autograd(_backward, setup_context=_setup)


def add_noise(x: torch.Tensor, eps: torch.Tensor, a: torch.Tensor, s: torch.Tensor, copies: int, dtype: torch.dtype
              ) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 1 of method.md. x, eps [N, C, H, W] in one float type; a, s [N]; differentiable in x.

    Returns x_t [N, C, H, W] in x's type and the networks' input [copies * N, C, H, W] in `dtype`, both in x's memory
    format. Raises ValueError for other shapes.
    """
    require_shapes("add_noise", (x, x.shape), (eps, x.shape), (a, (len(x),)), (s, (len(x),)))
    if not triton_runs_on(x):
        return add_noise_reference(x, eps, a, s, copies, dtype)
    return _add_noise(x, eps, a.contiguous(), s.contiguous(), copies, dtype)
