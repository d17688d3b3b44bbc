"""Images from a loaded pipeline: each from a prompt and a seed, whichever pipeline of diffusers it is."""

import torch
from diffusers.image_processor import VaeImageProcessor

from sidfast.common.errors import NonFiniteImage, UserError, first_reason

_FAULTS = (ValueError, TypeError, RuntimeError, AttributeError, LookupError, ArithmeticError)


def make_images(pipe, prompts, seeds, **options):
    """Images [N, 3, H, W] in [0, 1] of N prompts, in the pipeline's type and on its device.

    Each image has its own seed, drawn on the CPU, so an image does not depend on the batch that it is made in, nor on
    the device. `options` go to the pipeline. Raises UserError for a pipeline of someone else that fails.
    """
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    try:
        return pipe(list(prompts), generator=noise, output_type="pt", **options).images
    except torch.OutOfMemoryError:
        raise
    except _FAULTS as error:
        if "t_init" in pipe.config:                      # (an export of ours)
            raise
        raise UserError(f"{pipe.name_or_path}: its {type(pipe).__name__} cannot make an image of a prompt "
                        f"({first_reason(error)})") from error


def to_pil(images, name):
    """PIL images of images [N, 3, H, W] in [0, 1]. Raises NonFiniteImage, which names the model, for other values."""
    if not images.isfinite().all():
        raise NonFiniteImage(f"{name}: the model makes images with non-finite pixels; its weights are broken, its type "
                             "is too narrow, or its scheduler does not fit its kind of prediction")
    return VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(images))
