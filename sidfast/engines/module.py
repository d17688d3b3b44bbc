"""The network inside an engine."""

import functools

from torch import nn

from sidfast.engines.flat import FlatParameters


class EngineModule(nn.Module):
    """A network whose forward pass is whatever is asked of it: `engine(compute, *tensors)` is compute(unet, *tensors).

    So a DeepSpeed engine sees an update's loss, and not the UNet's output, as the output of its forward pass: its hooks
    for the backward pass then work alike for every way to run an update.

    `flat`: the parameters that an engine sees are those of a FlatParameters, and the UNet's are views, whose gradients
    somebody has to sum (GradientAccumulator); otherwise (ZeRO stage 3, which parts single parameters) they are the
    UNet's own.
    """

    def __init__(self, unet, flat=False):
        super().__init__()
        self._held = [unet]                              # (in a list it is no submodule)
        self.flat = FlatParameters(unet) if flat else None
        if not flat:
            self.network = unet

    @property
    def unet(self):
        """The UNet."""
        return self._held[0]

    @property
    def denoiser(self):
        """The UNet for passes that are not the engine's. At stage 3 they go through this module all the same: its hook
        tells DeepSpeed where a pass begins, or it could not foresee which weights come next."""
        return self.unet if self.flat else functools.partial(self, _call)

    def forward(self, compute, *tensors, **options):
        """compute(unet, *tensors, **options), whatever that returns."""
        return compute(self.unet, *tensors, **options)


def _call(unet, *tensors, **options):
    return unet(*tensors, **options)
