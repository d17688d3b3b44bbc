"""Guidance and denoising of a network's output (method.md, eqs. 2 and 3).

    o_kappa = o_null + kappa (o_cond - o_null)          x_hat = A x_t + B o_kappa

The output of a doubled batch is [2N, C, H, W], null half first; an output of N rows is taken as it stands.
"""


def guide_reference(output, n, kappa):
    """o_kappa [n, C, H, W] of an output with n or 2n rows."""
    if output.shape[0] == n:
        return output
    if output.shape[0] != 2 * n:
        raise ValueError(f"guide: {output.shape[0]} rows are neither {n} nor {2 * n}")
    null, cond = output.chunk(2)
    return null + kappa * (cond - null)


def denoise_reference(output, x_t, A, B, kappa):
    """x_hat [N, C, H, W] of an output [N or 2N, C, H, W]; x_t [N, C, H, W]; A, B [N]."""
    A, B = (v.to(x_t.dtype)[:, None, None, None] for v in (A, B))
    return A * x_t + B * guide_reference(output, x_t.shape[0], kappa)
