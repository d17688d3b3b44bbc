"""Which passes guidance needs, and prompt dropout (method.md, section 2)."""

import torch

from sidfast.method.denoise import predict


def predict_guided(network, x, t, text, null, kappas):
    """The output that `sidfast.kernels` combine at the given scales.

    x [N, C, H, W]; t [N]; text [N, L, D]; null [1, L, D]. All kappas 1: the conditional pass alone, [N, C, H, W]; all
    0: the null pass alone; otherwise one pass over a doubled batch, [2N, C, H, W], null half first.
    """
    if all(k == 1 for k in kappas):
        return predict(network, x, t, text)
    null = null.expand_as(text)
    if all(k == 0 for k in kappas):
        return predict(network, x, t, null)
    return predict(network, torch.cat([x, x]), torch.cat([t, t]), torch.cat([null, text]))


def drops_prompts(kappa1, kappa2, kappa3):
    """Whether the fake score's null branch is used, and so has to be trained."""
    return any(k != 1 for k in (kappa1, kappa2, kappa3))


def drop_prompts(text, null, dropped):
    """text [N, L, D] with null [1, L, D] in the rows where `dropped` [N] is true."""
    return torch.where(dropped[:, None, None], null, text)
