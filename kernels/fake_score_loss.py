"""The fake score's loss (method.md, eq. 5): w || o_kappa1 - target ||^2 per sample.

A sample with a non-finite target or output has loss 0 and zero gradients. With e = o_kappa1 - target and g = dL w:

    do_cond = 2 g kappa1 e          do_null = 2 g (1 - kappa1) e

One launch forward, one backward, as in `sid_loss`.
"""

import torch
import triton
import triton.language as tl
from sidfast.kernels.backend import flat_like, last_to_finish, require_shapes, sum_parts, triton_runs_on
from sidfast.kernels.guidance import guide, load_branches, store_branches

_BLOCK = 2048                                            # elements of a sample per program: 16 bytes of fp32 a thread
_MAX = tl.constexpr(3.4028234663852886e38)               # the largest finite fp32


def fake_score_loss_reference(output: torch.Tensor, target: torch.Tensor, w: torch.Tensor, kappa1: float
                              ) -> tuple[torch.Tensor, torch.Tensor]:
    """See `fake_score_loss`; plain PyTorch, in the type of the inputs."""
    error = guide(output, target.shape[0], kappa1) - target
    finite = error.isfinite().flatten(1).all(1)
    error = torch.where(finite[:, None, None, None], error, 0)
    return w * (error**2).sum((1, 2, 3)), finite


@triton.jit
def _load_error(p_output, p_target, i_n, o, m, N, D, kappa1, DOUBLED: tl.constexpr):
    b_null, b_cond = load_branches(p_output, o, m, i_n, N, D, DOUBLED)
    return b_null + kappa1 * (b_cond - b_null) - tl.load(p_target + i_n * D + o, mask=m, other=0.0).to(tl.float32)


@triton.jit
def _fake_score_loss_kernel(p_output, p_target, p_w, p_partial, p_done, p_loss, p_finite, N, D, kappa1,
                            DOUBLED: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr):
    i_n, i_c, n_c = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    o = i_c * BD + tl.arange(0, BD)
    b_error = _load_error(p_output, p_target, i_n, o, o < D, N, D, kappa1, DOUBLED)
    p_mine = p_partial + (i_n * n_c + i_c) * 2
    tl.store(p_mine, tl.sum(b_error * b_error))          # (elements outside the mask are 0)
    tl.store(p_mine + 1, tl.sum(tl.where(tl.abs(b_error) <= _MAX, 0.0, 1.0)))

    if last_to_finish(p_done + i_n, n_c):
        p_parts = p_partial + i_n * n_c * 2
        finite = sum_parts(p_parts + 1, n_c, 2, BC) == 0
        w = tl.load(p_w + i_n).to(tl.float32)
        tl.store(p_loss + i_n, tl.where(finite, w * sum_parts(p_parts, n_c, 2, BC), 0.0))
        tl.store(p_finite + i_n, finite.to(tl.int8))


@triton.jit
def _fake_score_loss_backward_kernel(p_dloss, DLOSS, p_finite, p_output, p_target, p_w, p_doutput, N, D, kappa1,
                                     DOUBLED: tl.constexpr, BD: tl.constexpr):
    i_n = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BD + tl.arange(0, BD)
    m = o < D
    b_error = _load_error(p_output, p_target, i_n, o, m, N, D, kappa1, DOUBLED)
    g = tl.load(p_dloss + i_n * DLOSS).to(tl.float32) * tl.load(p_w + i_n).to(tl.float32)
    b_do = tl.where(tl.load(p_finite + i_n) != 0, 2 * g * b_error, 0.0)          # 0 times a non-finite value is not 0
    store_branches(p_doutput, (1 - kappa1) * b_do, kappa1 * b_do, o, m, i_n, N, D, DOUBLED)


@torch.library.custom_op("sidfast::fake_score_loss", mutates_args=())
def _fake_score_loss(output: torch.Tensor, target: torch.Tensor, w: torch.Tensor, kappa1: float,
                     ) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss [N] and finite [N] (bool)."""
    output, target = flat_like(output, target)
    N, D = target.shape[0], target[0].numel()
    chunks = triton.cdiv(D, _BLOCK)
    loss = torch.empty(N, device=target.device)
    finite = torch.empty(N, device=target.device, dtype=torch.bool)
    partial = torch.empty(N, chunks, 2, device=target.device)
    done = torch.zeros(N, device=target.device, dtype=torch.int32)
    _fake_score_loss_kernel[(N, chunks)](output, target, w, partial, done, loss, finite.view(torch.int8), N, D, kappa1,
                                         DOUBLED=output.shape[0] > N, BD=_BLOCK, BC=32, num_warps=16)
    return loss, finite


@_fake_score_loss.register_fake
def _(output, target, w, kappa1):
    loss = target.new_empty(target.shape[0], dtype=torch.float32)
    return loss, loss.bool()


@torch.library.custom_op("sidfast::fake_score_loss_backward", mutates_args=())
def _fake_score_loss_backward(dloss: torch.Tensor, finite: torch.Tensor, output: torch.Tensor, target: torch.Tensor,
                              w: torch.Tensor, kappa1: float) -> torch.Tensor:
    """The gradient of the output."""
    output, target = flat_like(output, target)
    N, D = target.shape[0], target[0].numel()
    doutput = torch.empty_like(output)
    _fake_score_loss_backward_kernel[(N, triton.cdiv(D, _BLOCK))](
        dloss, dloss.stride(0), finite.view(torch.int8), output, target, w, doutput, N, D, kappa1,
        DOUBLED=output.shape[0] > N, BD=_BLOCK, num_warps=16)
    return doutput


@_fake_score_loss_backward.register_fake
def _(dloss, finite, output, target, w, kappa1):
    return torch.empty_like(flat_like(output)[0])


def _setup(ctx, inputs, output):
    ctx.kappa1 = inputs[-1]
    ctx.save_for_backward(output[1], *inputs[:-1])


def _backward(ctx, dloss, _):
    return _fake_score_loss_backward(dloss, *ctx.saved_tensors, ctx.kappa1), None, None, None


_fake_score_loss.register_autograd(_backward, setup_context=_setup)


def fake_score_loss(output: torch.Tensor, target: torch.Tensor, w: torch.Tensor, kappa1: float
                    ) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 5 of method.md. output [N or 2N, C, H, W]; target [N, C, H, W]; w [N]; fp32, bf16 or fp16, arithmetic in
    fp32.

    Returns the loss [N] and finite [N] (bool): the samples that count. Differentiable in the output alone. Raises
    ValueError for other shapes.
    """
    N, *sample = target.shape
    if output.shape[0] not in (N, 2 * N):
        raise ValueError(f"fake_score_loss: {output.shape[0]} rows are neither {N} nor {2 * N}")
    require_shapes("fake_score_loss", (output, (len(output), *sample)), (target, target.shape), (w, (N,)))
    if not triton_runs_on(output):
        return fake_score_loss_reference(output, target, w, kappa1)
    return _fake_score_loss(output, target, w.contiguous(), float(kappa1))
