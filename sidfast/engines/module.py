"""The network inside an engine."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sidfast.engines.flat import FlatParameters


class EngineModule(nn.Module):
    """Runs any function of its network: `engine(compute, *tensors)` is compute(network, *tensors).

    A DeepSpeed engine then sees an update's loss, not the network's output, as the output of its forward pass, so its
    hooks for the backward pass work alike for every way to run an update.

    `flat`: the engine sees the parameters of a FlatParameters. The network's own parameters are views, whose gradients
    a GradientAccumulator sums. Otherwise (ZeRO stage 3, which shards single parameters) the engine sees the network's
    own parameters.
    """

    def __init__(self, network: nn.Module, flat: bool = False):
        super().__init__()
        self._held = [network]                           # (in a list it is not a submodule)
        self.flat = FlatParameters(network) if flat else None
        if not flat:
            self.sharded = network

    @property
    def network(self) -> nn.Module:
        """The network."""
        return self._held[0]

    @property
    def denoiser(self) -> Callable:
        """The network for passes that are not the engine's. At stage 3 they go through this module: its hook tells
        DeepSpeed where a pass begins, so that it can prefetch the next weights."""
        if self.flat:
            return self.network
        denoiser: Any = functools.partial(self, _call)
        denoiser.repeats_images = getattr(self.network, "repeats_images", False)
        return denoiser

    def forward(self, compute: Callable, *tensors: torch.Tensor, **options) -> Any:
        """compute(network, *tensors, **options)."""
        return compute(self.network, *tensors, **options)


def _call(network, *tensors, **options):
    return network(*tensors, **options)
