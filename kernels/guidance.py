"""Guidance and denoising of a network's output (method.md, eqs. 2 and 3).

    o_kappa = o_null + kappa (o_cond - o_null)          x_hat = A x_t + B o_kappa

The output of a doubled batch is [2N, C, H, W], null half first; an output of N rows is taken as it stands.
The losses do both inside their kernels, on what `load_branches` reads.
"""

import torch
import triton
import triton.language as tl


def guide(output: torch.Tensor, n: int, kappa: float) -> torch.Tensor:
    """o_kappa [n, C, H, W] (method.md, eq. 3), in fp32 or better, of an output [n or 2n, C, H, W].

    Raises ValueError for another number of rows.
    """
    output = output.to(torch.promote_types(output.dtype, torch.float32))
    if output.shape[0] == n:
        return output
    if output.shape[0] != 2 * n:
        raise ValueError(f"guide: {output.shape[0]} rows are neither {n} nor {2 * n}")
    null, cond = output.chunk(2)
    return null + kappa * (cond - null)


def denoise(output: torch.Tensor, x_t: torch.Tensor, A: torch.Tensor, B: torch.Tensor, kappa: float) -> torch.Tensor:
    """x_hat [N, C, H, W] (method.md, eqs. 2 and 3) of an output [N or 2N, C, H, W], in whose memory format it comes;
    x_t [N, C, H, W]; A, B [N].

    Raises ValueError for another number of rows.
    """
    A, B = (v.to(x_t.dtype)[:, None, None, None] for v in (A, B))
    return B * guide(output, x_t.shape[0], kappa) + A * x_t


@triton.jit
def load_branches(p_output, o, m, i_n, N, D, DOUBLED: tl.constexpr):
    """Elements o of sample i_n of an output with N or 2N rows of D elements: (o_null, o_cond) in fp32."""
    b_cond = tl.load(p_output + (i_n + N * DOUBLED) * D + o, mask=m, other=0.0).to(tl.float32)
    b_null = b_cond
    if DOUBLED:
        b_null = tl.load(p_output + i_n * D + o, mask=m, other=0.0).to(tl.float32)
    return b_null, b_cond


@triton.jit
def store_branches(p_doutput, b_null, b_cond, o, m, i_n, N, D, DOUBLED: tl.constexpr):
    """The counterpart of `load_branches` for gradients; without a null half its gradient is added to the other's."""
    if DOUBLED:
        tl.store(p_doutput + i_n * D + o, b_null.to(p_doutput.dtype.element_ty), mask=m)
        tl.store(p_doutput + (i_n + N) * D + o, b_cond.to(p_doutput.dtype.element_ty), mask=m)
    else:
        tl.store(p_doutput + i_n * D + o, (b_null + b_cond).to(p_doutput.dtype.element_ty), mask=m)
