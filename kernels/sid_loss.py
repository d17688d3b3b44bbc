"""The generator's loss (method.md, eqs. 6, 7 and 8), from network outputs to a number per sample.

    y_real, y_2, y_3 = x_hat of the teacher at kappa4, of the fake score at kappa2 and kappa3
    omega = 1 / max(mean |x_g - y_real|, 1e-5)                                             no gradient
    L = omega * sum [ (1 - alpha) (y_real - y_2)^2 + (y_real - y_2) (y_3 - x_g) ]

A sample with a non-finite x_g, y_real, y_2 or y_3 has loss 0 and zero gradients.
"""

import torch
from sidfast.kernels.guidance import denoise_reference


def sid_loss_reference(x_g, x_t, o_real, o_fake, A, B, kappa2, kappa3, kappa4, alpha):
    """x_g, x_t [N, C, H, W]; o_real, o_fake [N or 2N, C, H, W]; A, B [N].

    Returns the loss [N] and finite [N] (bool): the samples that count.
    """
    y_real = denoise_reference(o_real, x_t, A, B, kappa4)
    y_2 = denoise_reference(o_fake, x_t, A, B, kappa2)
    y_3 = y_2 if kappa3 == kappa2 else denoise_reference(o_fake, x_t, A, B, kappa3)
    finite = torch.stack([v.isfinite().flatten(1).all(1) for v in (x_g, y_real, y_2, y_3)]).all(0)
    keep = finite[:, None, None, None]
    x_g, y_real, y_2, y_3 = (torch.where(keep, v, 0) for v in (x_g, y_real, y_2, y_3))

    omega = 1 / (x_g - y_real).detach().abs().mean((1, 2, 3)).clamp_min(1e-5)
    gap = y_real - y_2
    loss = (1 - alpha) * gap**2 + gap * (y_3 - x_g)
    return omega * loss.sum((1, 2, 3)), finite
