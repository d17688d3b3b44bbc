"""The generator's loss (method.md, eqs. 6, 7 and 8), from network outputs to a number per sample.

    y_real, y_2, y_3 = x_hat of the teacher at kappa4, of the fake score at kappa2 and kappa3
    omega = 1 / max(mean |x_g - y_real|, 1e-5)                                             no gradient
    L = omega * sum [ (1 - alpha) (y_real - y_2)^2 + (y_real - y_2) (y_3 - x_g) ]

A sample with a non-finite x_g, y_real, y_2 or y_3 has loss 0 and zero gradients.

With gap = y_real - y_2 = B (o_real - o_2), in which x_t cancels, and g = dL omega:

    dy_real = -dy_2 = g (2 (1 - alpha) gap + y_3 - x_g)        dy_3 = g gap = -dx_g        dx_t = A g gap

Forward is one launch: every program sums its part of a sample, and the last one of a sample to finish adds the parts
up, in a fixed order. Backward is a second launch over the same inputs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from sidfast.kernels.backend import flat_like, last_to_finish, require_shapes, sum_parts, triton_runs_on
from sidfast.kernels.guidance import denoise, load_branches, store_branches

_BLOCK = 2048                                            # elements of a sample per program
_MAX = tl.constexpr(3.4028234663852886e38)               # the largest finite fp32


def sid_loss_reference(x_g: torch.Tensor, x_t: torch.Tensor, o_real: torch.Tensor, o_fake: torch.Tensor,
                       A: torch.Tensor, B: torch.Tensor, kappa2: float, kappa3: float, kappa4: float, alpha: float
                       ) -> tuple[torch.Tensor, torch.Tensor]:
    """See `sid_loss`; plain PyTorch, in the type of the inputs."""
    y_real = denoise(o_real, x_t, A, B, kappa4)
    y_2 = denoise(o_fake, x_t, A, B, kappa2)
    y_3 = y_2 if kappa3 == kappa2 else denoise(o_fake, x_t, A, B, kappa3)
    finite = torch.stack([v.isfinite().flatten(1).all(1) for v in (x_g, y_real, y_2, y_3)]).all(0)
    keep = finite[:, None, None, None]
    x_g, y_real, y_2, y_3 = (torch.where(keep, v, 0) for v in (x_g, y_real, y_2, y_3))

    omega = 1 / (x_g - y_real).detach().abs().mean((1, 2, 3)).clamp_min(1e-5)
    gap = y_real - y_2
    loss = (1 - alpha) * gap**2 + gap * (y_3 - x_g)
    return omega * loss.sum((1, 2, 3)), finite


@triton.jit
def _load(p_x_g, p_x_t, p_o_real, p_o_fake, p_A, p_B, i_n, o, m, N, D, kappa2, kappa3, kappa4,
          REAL: tl.constexpr, FAKE: tl.constexpr):
    """Elements o of x_g, A x_t, B o_real, B o_2 and B o_3, in fp32."""
    b_x_g = tl.load(p_x_g + i_n * D + o, mask=m, other=0.0).to(tl.float32)
    b_x_t = tl.load(p_x_t + i_n * D + o, mask=m, other=0.0).to(tl.float32)
    b_A, b_B = tl.load(p_A + i_n).to(tl.float32), tl.load(p_B + i_n).to(tl.float32)
    b_null, b_cond = load_branches(p_o_real, o, m, i_n, N, D, REAL)
    b_real = b_B * (b_null + kappa4 * (b_cond - b_null))
    b_null, b_cond = load_branches(p_o_fake, o, m, i_n, N, D, FAKE)
    b_2 = b_B * (b_null + kappa2 * (b_cond - b_null))
    b_3 = b_B * (b_null + kappa3 * (b_cond - b_null))
    return b_x_g, b_A * b_x_t, b_real, b_2, b_3


@triton.jit
def _sid_loss_kernel(p_x_g, p_x_t, p_o_real, p_o_fake, p_A, p_B, p_partial, p_done, p_loss, p_finite, p_omega, N, D,
                     kappa2, kappa3, kappa4, alpha, REAL: tl.constexpr, FAKE: tl.constexpr, BD: tl.constexpr,
                     BC: tl.constexpr):
    i_n, i_c, n_c = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    o = i_c * BD + tl.arange(0, BD)
    b_x_g, b_x, b_real, b_2, b_3 = _load(p_x_g, p_x_t, p_o_real, p_o_fake, p_A, p_B, i_n, o, o < D, N, D,
                                         kappa2, kappa3, kappa4, REAL, FAKE)
    b_gap = b_real - b_2
    b_finite = ((tl.abs(b_x_g) <= _MAX) & (tl.abs(b_x + b_real) <= _MAX)
                & (tl.abs(b_x + b_2) <= _MAX) & (tl.abs(b_x + b_3) <= _MAX))
    p_mine = p_partial + (i_n * n_c + i_c) * 3
    tl.store(p_mine, tl.sum((1 - alpha) * b_gap * b_gap + b_gap * (b_x + b_3 - b_x_g)))
    tl.store(p_mine + 1, tl.sum(tl.abs(b_x_g - b_x - b_real)))             # (elements outside the mask are 0)
    tl.store(p_mine + 2, tl.sum(tl.where(b_finite, 0.0, 1.0)))

    if last_to_finish(p_done + i_n, n_c):
        p_parts = p_partial + i_n * n_c * 3
        distance = sum_parts(p_parts + 1, n_c, 3, BC) / D
        finite = sum_parts(p_parts + 2, n_c, 3, BC) == 0
        omega = tl.where(finite, 1 / tl.maximum(distance, 1e-5), 0.0)
        tl.store(p_loss + i_n, tl.where(finite, omega * sum_parts(p_parts, n_c, 3, BC), 0.0))
        tl.store(p_omega + i_n, omega)
        tl.store(p_finite + i_n, finite.to(tl.int8))


@triton.jit
def _sid_loss_backward_kernel(p_dloss, DLOSS, p_omega, p_finite, p_x_g, p_x_t, p_o_real, p_o_fake, p_A, p_B, p_dx_g,
                              p_dx_t, p_do_real, p_do_fake, N, D, kappa2, kappa3, kappa4, alpha, REAL: tl.constexpr,
                              FAKE: tl.constexpr, BD: tl.constexpr):
    i_n = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BD + tl.arange(0, BD)
    m = o < D
    b_x_g, b_x, b_real, b_2, b_3 = _load(p_x_g, p_x_t, p_o_real, p_o_fake, p_A, p_B, i_n, o, m, N, D,
                                         kappa2, kappa3, kappa4, REAL, FAKE)
    b_gap = b_real - b_2
    b_A, b_B = tl.load(p_A + i_n).to(tl.float32), tl.load(p_B + i_n).to(tl.float32)
    g = tl.load(p_dloss + i_n * DLOSS).to(tl.float32) * tl.load(p_omega + i_n)
    keep = tl.load(p_finite + i_n) != 0                  # 0 times a non-finite value is not 0
    b_dy_3 = tl.where(keep, g * b_gap, 0.0)
    b_dy_real = tl.where(keep, g * (2 * (1 - alpha) * b_gap + b_x + b_3 - b_x_g), 0.0)

    tl.store(p_dx_g + i_n * D + o, (-b_dy_3).to(p_dx_g.dtype.element_ty), mask=m)
    tl.store(p_dx_t + i_n * D + o, (b_A * b_dy_3).to(p_dx_t.dtype.element_ty), mask=m)
    b_do = b_B * b_dy_real
    store_branches(p_do_real, (1 - kappa4) * b_do, kappa4 * b_do, o, m, i_n, N, D, REAL)
    b_do_3 = b_B * b_dy_3
    store_branches(p_do_fake, (1 - kappa3) * b_do_3 - (1 - kappa2) * b_do, kappa3 * b_do_3 - kappa2 * b_do,
                   o, m, i_n, N, D, FAKE)


@torch.library.custom_op("sidfast::sid_loss", mutates_args=())
def _sid_loss(x_g: torch.Tensor, x_t: torch.Tensor, o_real: torch.Tensor, o_fake: torch.Tensor, A: torch.Tensor,
              B: torch.Tensor, kappa2: float, kappa3: float, kappa4: float, alpha: float,
              ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss [N], finite [N] (bool) and omega [N]."""
    x_g, x_t, o_real, o_fake = flat_like(x_g, x_t, o_real, o_fake)
    N, D = x_g.shape[0], x_g[0].numel()
    chunks = triton.cdiv(D, _BLOCK)
    loss, omega = (torch.empty(N, device=x_g.device) for _ in range(2))
    finite = torch.empty(N, device=x_g.device, dtype=torch.bool)
    partial = torch.empty(N, chunks, 3, device=x_g.device)
    done = torch.zeros(N, device=x_g.device, dtype=torch.int32)
    _sid_loss_kernel[(N, chunks)](
        x_g, x_t, o_real, o_fake, A, B, partial, done, loss, finite.view(torch.int8), omega, N, D, kappa2, kappa3,
        kappa4, alpha, REAL=o_real.shape[0] > N, FAKE=o_fake.shape[0] > N, BD=_BLOCK, BC=32, num_warps=8)
    return loss, finite, omega


@_sid_loss.register_fake
def _(x_g, x_t, o_real, o_fake, A, B, kappa2, kappa3, kappa4, alpha):
    loss = x_g.new_empty(x_g.shape[0], dtype=torch.float32)
    return loss, loss.bool(), torch.empty_like(loss)


@torch.library.custom_op("sidfast::sid_loss_backward", mutates_args=())
def _sid_loss_backward(dloss: torch.Tensor, omega: torch.Tensor, finite: torch.Tensor, x_g: torch.Tensor,
                       x_t: torch.Tensor, o_real: torch.Tensor, o_fake: torch.Tensor, A: torch.Tensor, B: torch.Tensor,
                       kappa2: float, kappa3: float, kappa4: float, alpha: float,
                       ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x_g, x_t, o_real and o_fake."""
    inputs = flat_like(x_g, x_t, o_real, o_fake)
    grads: Any = tuple(torch.empty_like(v) for v in inputs)
    N, D = x_g.shape[0], x_g[0].numel()
    _sid_loss_backward_kernel[(N, triton.cdiv(D, _BLOCK))](
        dloss, dloss.stride(0), omega, finite.view(torch.int8), *inputs, A, B, *grads, N, D, kappa2, kappa3, kappa4,
        alpha, REAL=o_real.shape[0] > N, FAKE=o_fake.shape[0] > N, BD=_BLOCK, num_warps=8)
    return grads


@_sid_loss_backward.register_fake
def _(dloss, omega, finite, x_g, x_t, o_real, o_fake, A, B, kappa2, kappa3, kappa4, alpha):
    return tuple(torch.empty_like(v) for v in flat_like(x_g, x_t, o_real, o_fake))


def _setup(ctx, inputs, output):
    *tensors, ctx.kappa2, ctx.kappa3, ctx.kappa4, ctx.alpha = inputs
    _, finite, omega = output
    ctx.save_for_backward(omega, finite, *tensors)


def _backward(ctx, dloss, *_):
    grads = _sid_loss_backward(dloss, *ctx.saved_tensors, ctx.kappa2, ctx.kappa3, ctx.kappa4, ctx.alpha)
    return *grads, None, None, None, None, None, None


_sid_loss.register_autograd(_backward, setup_context=_setup)


def sid_loss(x_g: torch.Tensor, x_t: torch.Tensor, o_real: torch.Tensor, o_fake: torch.Tensor, A: torch.Tensor,
             B: torch.Tensor, kappa2: float, kappa3: float, kappa4: float, alpha: float
             ) -> tuple[torch.Tensor, torch.Tensor]:
    """Eqs. 6 to 8 of method.md. x_g, x_t [N, C, H, W]; o_real, o_fake [N or 2N, C, H, W]; A, B [N]; fp32, bf16 or fp16,
    arithmetic in fp32.

    Returns the loss [N] and finite [N] (bool): the samples that count. Differentiable in the first four. Raises
    ValueError for other shapes.
    """
    N, *sample = x_g.shape
    for name, output in (("o_real", o_real), ("o_fake", o_fake)):
        if output.shape[0] not in (N, 2 * N):
            raise ValueError(f"sid_loss: {name} has {output.shape[0]} rows, neither {N} nor {2 * N}")
    require_shapes("sid_loss", (x_t, x_g.shape), (A, (N,)), (B, (N,)),
                   *((output, (len(output), *sample)) for output in (o_real, o_fake)))
    scales = (float(v) for v in (kappa2, kappa3, kappa4, alpha))
    args: Any = (x_g, x_t, o_real, o_fake, A.contiguous(), B.contiguous(), *scales)
    if not triton_runs_on(x_g):
        return sid_loss_reference(*args)
    return _sid_loss(*args)[:2]
