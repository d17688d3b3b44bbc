"""The two losses on network outputs (method.md, eqs. 5 to 8), per sample."""

from sidfast.kernels.fake_score_loss import fake_score_loss as fake_score_loss_kernel
from sidfast.kernels.sid_loss import sid_loss
from sidfast.method.denoise import denoise_coefficients, prediction_target


def fake_score_loss(output, x_g, eps, a, s, prediction_type, kappa1):
    """Eq. 5. output [N or 2N, C, H, W] at x_t = a x_g + s eps; x_g, eps [N, C, H, W]; a, s [N].

    Returns loss [N] and finite [N] (bool). A gradient flows to the output alone. Raises ValueError for an unknown
    prediction type, or an output with neither N nor 2N rows.
    """
    target, w = prediction_target(prediction_type, x_g, eps, a, s)
    return fake_score_loss_kernel(output, target, w, kappa1)


def generator_loss(x_g, x_t, o_real, o_fake, a, s, prediction_type, kappas, alpha):
    """Eqs. 6 to 8. x_g, x_t [N, C, H, W]; o_real, o_fake [N or 2N, C, H, W]; a, s [N]; kappas: (kappa2, kappa3,
    kappa4).

    Returns loss [N] and finite [N] (bool). Gradients flow to x_g, x_t and both outputs. Raises ValueError for an
    unknown prediction type, or an output with neither N nor 2N rows.
    """
    A, B = denoise_coefficients(prediction_type, a, s)
    return sid_loss(x_g, x_t, o_real, o_fake, A, B, *kappas, alpha)
