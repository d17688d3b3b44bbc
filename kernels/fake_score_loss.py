"""The fake score's loss (method.md, eq. 5): w || o_kappa1 - target ||^2 per sample.

A sample with a non-finite target or output has loss 0 and zero gradients.
"""

import torch
from sidfast.kernels.guidance import guide_reference


def fake_score_loss_reference(output, target, w, kappa1):
    """output [N or 2N, C, H, W]; target [N, C, H, W]; w [N]. Returns the loss [N] and finite [N] (bool)."""
    error = guide_reference(output, target.shape[0], kappa1) - target
    finite = error.isfinite().flatten(1).all(1)
    error = torch.where(finite[:, None, None, None], error, 0)
    return w * (error**2).sum((1, 2, 3)), finite
