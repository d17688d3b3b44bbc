"""The network inside an engine."""

from torch import nn


class Trained(nn.Module):
    """A network whose forward pass is whatever is asked of it: `engine(compute, *tensors)` is compute(unet, *tensors).

    So a DeepSpeed engine sees an update's loss, and not the UNet's output, as the output of its forward pass: its hooks
    for the backward pass then work alike for an update that runs as written and for one that is a CUDA graph.
    """

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, compute, *tensors):
        """compute(unet, *tensors), whatever that returns."""
        return compute(self.unet, *tensors)
