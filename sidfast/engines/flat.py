"""A network's parameters end to end in a few flat tensors.

Optimizers, DeepSpeed's hooks and collective calls cost Python and launches for every tensor they handle: for a UNet of
several hundred parameters longer, on a fast GPU, than the arithmetic. Laid out flat they handle a handful. The network
goes on reading its own parameters, which are views.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

BUCKET, _ALIGNED = 2**26, 64                             # elements


@dataclass(frozen=True)
class ParamSlice:
    name: str
    parameter: nn.Parameter
    start: int

    def view(self, bucket: torch.Tensor) -> torch.Tensor:
        """The part of a bucket that is this parameter, in its shape and memory layout."""
        p = self.parameter
        return bucket.detach()[self.start:self.start + p.numel()].as_strided(p.shape, p.stride())


class FlatParameters(nn.Module):
    """Holds all parameters of `network` in `buckets`, parameters themselves, of about BUCKET elements; zeros between
    them align each for the kernels that read it.

    The network's own parameters are views from `bind` on. Call it again whenever the buckets have moved in memory or
    changed their type. Dense parameters keep their memory layout (channels last, for example).
    """

    def __init__(self, network):
        super().__init__()
        self._places, sizes = [], []                     # of each bucket
        for name, p in network.named_parameters():
            if not sizes or sizes[-1] + p.numel() > BUCKET:
                self._places.append([])
                sizes.append(0)
            self._places[-1].append(ParamSlice(name, p, sizes[-1]))
            sizes[-1] += -(-p.numel() // _ALIGNED) * _ALIGNED
        kind = {"dtype": p.dtype, "device": p.device}
        self.buckets = nn.ParameterList(nn.Parameter(torch.zeros(size, **kind)) for size in sizes)
        with torch.no_grad():
            for place, view in self._views(self.buckets):
                view.copy_(place.parameter)
        self.bind()

    def bind(self) -> None:
        """Make the network's parameters views of the buckets as they are now."""
        for place, view in self._views(self.buckets):
            place.parameter.data = view

    def parts(self, i: int, bucket: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        """[(name, its part)] of each parameter in a tensor laid out like bucket number `i`."""
        return [(place.name, place.view(bucket)) for place in self._places[i]]

    def named(self, tensors: Sequence[torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
        """The same of tensors laid out like all buckets."""
        return [part for i, tensor in enumerate(tensors) for part in self.parts(i, tensor)]

    def like(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """Zeros laid out like the buckets."""
        return [torch.zeros_like(c, dtype=dtype, requires_grad=False) for c in self.buckets]

    def _views(self, tensors):
        return [(place, place.view(t)) for places, t in zip(self._places, tensors, strict=True) for place in places]
