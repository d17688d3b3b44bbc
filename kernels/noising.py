"""Noising: x_t = a x + s eps (method.md, eq. 1)."""


def add_noise_reference(x, eps, a, s):
    """x, eps [N, C, H, W]; a, s [N]. Returns x_t [N, C, H, W] in x's type."""
    a, s = (v.to(x.dtype)[:, None, None, None] for v in (a, s))
    return a * x + s * eps
