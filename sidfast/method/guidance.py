"""Which passes guidance needs, and prompt dropout (method.md, section 2)."""

import torch

from sidfast.method.denoise import predict


def passes(kappas):
    """1 or 2: the passes that eq. 3 needs at the given scales. The conditional alone if all are 1, the null alone if
    all are 0; otherwise both, as one over a doubled batch."""
    return 1 if all(k == 1 for k in kappas) or all(k == 0 for k in kappas) else 2


def copies(network, kappas):
    """How often `predict_guided` wants x_t: once for each pass, unless the network itself repeats it (FusedUNet)."""
    return 1 if getattr(network, "repeats_images", False) else passes(kappas)


def predict_guided(network, x, t, text, null, kappas):
    """o_null and o_cond of eq. 3, which `sidfast.kernels` combine at the given scales; or the one that these need.

    x [copies * N, C, H, W], x_t as often as `copies` says; timesteps t [N]; text [N, L, D]; null [1, L, D]. Returns
    [passes * N, C, H, W], null half first.
    """
    if all(k == 1 for k in kappas):
        return predict(network, x, t, text)
    null = null.expand_as(text)
    if all(k == 0 for k in kappas):
        return predict(network, x, t, null)
    return predict(network, x, t.repeat(len(x) // len(t)), torch.cat([null, text]))


def drops_prompts(kappa1, kappa2, kappa3):
    """Whether the fake score's null branch is used, and so has to be trained."""
    return any(k != 1 for k in (kappa1, kappa2, kappa3))


def drop_prompts(text, null, dropped):
    """text [N, L, D] with null [1, L, D] in the rows where `dropped` [N] is true."""
    return torch.where(dropped[:, None, None], null, text)
