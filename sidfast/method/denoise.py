"""From a network's output to a denoised estimate (method.md, eqs. 2, 4 and 6)."""

import torch

PREDICTION_TYPES = ("epsilon", "v_prediction")


def denoise_coefficients(prediction_type, a, s):
    """(A, B) with x_hat = A x_t + B o (method.md, eq. 2), for a, s of any shape with a^2 + s^2 = 1, each of that shape.

    Raises ValueError for a prediction type that is not one of PREDICTION_TYPES.
    """
    if prediction_type == "epsilon":
        return 1 / a, -s / a
    if prediction_type == "v_prediction":
        return a, -s
    raise _unknown(prediction_type)


def prediction_target(prediction_type, x, eps, a, s):
    """What the network should output at x_t = a x + s eps, and the weight w (method.md, eq. 5).

    x, eps [N, C, H, W]; a, s [N]. Returns target [N, C, H, W] and w [N]. Raises ValueError for a prediction type that
    is not one of PREDICTION_TYPES.
    """
    if prediction_type == "epsilon":
        return eps, torch.ones_like(a)
    if prediction_type == "v_prediction":
        target = a[:, None, None, None] * eps - s[:, None, None, None] * x
        return target, a**2                              # SNR / (SNR + 1) = a^2
    raise _unknown(prediction_type)


def _unknown(prediction_type):
    return ValueError(f"prediction type {prediction_type!r} is not one of {', '.join(PREDICTION_TYPES)}")


def predict(network, x, t, text):
    """The output o [N, C, H, W] of one pass of a (diffusers) UNet, in the text's type.

    x [N, C, H, W]; timesteps t [N]; text [N, L, D].
    """
    return network(x.to(text.dtype), t, encoder_hidden_states=text, return_dict=False)[0]
