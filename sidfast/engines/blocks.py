"""One parameter for each block of a fused UNet, as ZeRO stage 3 wants it.

Stage 3 gathers a block's parameters before every pass and gives them back after it, at a cost of Python for each of
them: for several hundred, ten times what the GPU needs for the arithmetic. Blocks whose parameters lie end to end in
one cost it once. What autograd saves of a weight is then a place in that parameter, not its memory, which stage 3 takes
back between the two passes.
"""

import functools
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from sidfast.accel.unet_blocks import BLOCKS

_ALIGNED = 64                                            # elements, for the kernels that read a weight


class ParamSlice(NamedTuple):
    module: nn.Module
    attribute: str
    name: str                                            # in the whole network
    shape: torch.Size
    start: int
    piece: int                                           # its number among `FlatBlock.sizes`

    def view(self, whole: torch.Tensor) -> torch.Tensor:
        """The part of a flat tensor that is this parameter."""
        return self.shaped(whole[self.start:self.start + self.shape.numel()])

    def shaped(self, part: torch.Tensor) -> torch.Tensor:
        """That part in the parameter's shape; a convolution's lies channels last."""
        if len(self.shape) != 4:
            return part.view(self.shape)
        K, C, h, w = self.shape
        return part.view(K, h, w, C).permute(0, 3, 1, 2)


class FlatBlock:
    """Part of the class of a block whose parameters are one, `joined`; see `flatten_blocks`."""

    joined: nn.Parameter
    places, sizes = (), ()

    def forward(self, *inputs: Any) -> Any:
        """As the block's own."""
        with self._parameters_at_hand():
            if self.recomputed:                          # (the checkpoint saves nothing, and has hooks of its own)
                return super().forward(*inputs)
            with saved_tensors_hooks(*_places_instead_of(self.joined)):
                return super().forward(*inputs)

    recomputed = False

    @contextmanager
    def _parameters_at_hand(self):
        pieces = self.joined.split(self.sizes)           # (slices would each make a gradient of their own)
        for place in self.places:
            place.module.__dict__[place.attribute] = place.shaped(pieces[place.piece])
        try:
            yield
        finally:
            for place in self.places:
                place.module.__dict__[place.attribute] = None


class _WholeParam(NamedTuple):
    name: str
    shape: torch.Size

    def view(self, whole):
        """All of it."""
        return whole


def flatten_blocks(network: nn.Module) -> nn.Module:
    """Lay the parameters of each block of a fused network end to end, in place, and return it; others stay as is."""
    for name, block in network.named_modules():
        if type(block) in BLOCKS:
            _join(name, block)
            block.recomputed = network.checkpointing
    return network


def param_slices(network: nn.Module) -> list[tuple[Any, Any]]:
    """[(parameter, its places)] of a network, joined or not. A place has the `name` and `shape` of a parameter that the
    network had, and `view(tensor)`, which is that parameter's part of a tensor shaped like the present one."""
    blocks = {id(block.joined): block.places for block in network.modules() if isinstance(block, FlatBlock)}
    return [(p, blocks.get(id(p)) or (_WholeParam(name, getattr(p, "ds_shape", p.shape)),))    # (stage 3 empties it)
            for name, p in network.named_parameters()]


def _join(prefix, block):
    found, pieces, sizes = [], [], []
    for name, p in list(block.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        module = block.get_submodule(owner)
        found.append(ParamSlice(module, attribute, f"{prefix}.{name}", p.shape, sum(sizes), len(sizes)))
        pieces.append(_flattened(p))
        sizes += [n for n in (p.numel(), len(pieces[-1]) - p.numel()) if n]      # (the second aligns the next)
        del module._parameters[attribute]
        module.__dict__[attribute] = None
    requires_grad = any(p.requires_grad for p in pieces)
    block.register_parameter("joined", nn.Parameter(torch.cat(pieces).detach(), requires_grad))
    block.__class__, block.places, block.sizes = _joined_class(type(block)), tuple(found), sizes


def _flattened(p):
    flat = (p.permute(0, 2, 3, 1) if p.ndim == 4 else p).flatten()
    return nn.functional.pad(flat, (0, -len(flat) % _ALIGNED))


def _places_instead_of(joined):
    """Hooks for saved tensors, (pack, unpack): what lies in a parameter's memory is saved as its place in there."""
    memory, first = joined.untyped_storage().data_ptr(), joined.storage_offset()

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() != memory:
            return tensor
        return tensor.shape, tensor.stride(), tensor.storage_offset() - first

    def unpack(saved):
        if isinstance(saved, torch.Tensor):
            return saved
        shape, stride, offset = saved
        return joined.detach().as_strided(shape, stride, offset + joined.storage_offset())

    return pack, unpack


@functools.cache
def _joined_class(of):
    return type(f"FlatBlock{of.__name__}", (FlatBlock, of), {"__doc__": of.__doc__})
