"""Weights in the form that passes read, made once for many passes.

Passes want convolutions' weights channels last, attention's projections as one matrix, a 3x3 kernel after an upsampling
as a 2x2 one. Making these takes bandwidth and launches in every pass, though weights change once a step. What lies in
memory as passes want it (`pass_layout`, and neighbours in a FlatParameters) is read where it is.
"""


import torch
from torch import nn


class Prepacked:
    """A module whose passes read `cache` instead of its parameters, once `refresh` was called; until then they make
    what they need themselves. `refresh` must be called after every change of a parameter: it writes in place, so that
    CUDA graphs may hold the cache.
    """

    cache = None

    def prepack(self) -> tuple[torch.Tensor, ...]:
        """The tensors that passes read, a tuple, out of the parameters."""
        raise NotImplementedError

    @torch.no_grad()
    def refresh(self) -> None:
        """Keep what the parameters give now."""
        made = self.prepack()
        if self.cache is None or any((a.dtype, a.device) != (b.dtype, b.device)
                                    for a, b in zip(self.cache, made, strict=True)):
            self.cache = made
        else:
            for old, new in zip(self.cache, made, strict=True):
                if old.data_ptr() != new.data_ptr():     # (a parameter that lies as passes want it)
                    old.copy_(new)


def refresh(unet: nn.Module) -> None:
    """Bring up to date what a fused UNet keeps; call it after every change of its parameters. Others have nothing."""
    for module in unet.modules():
        if isinstance(module, Prepacked):
            module.refresh()


def pass_layout(unet: nn.Module) -> nn.Module:
    """Lay a UNet's convolutions out as its passes read them, in place, and return it."""
    return unet.to(memory_format=torch.channels_last)


def prepacked_bytes(unet: nn.Module) -> int:
    """Bytes of what a UNet keeps besides its parameters."""
    own = {p.untyped_storage()._cdata for p in unet.parameters()}
    return sum(t.nbytes for m in unet.modules() if isinstance(m, Prepacked) for t in m.cache or ()
               if t.untyped_storage()._cdata not in own)


def channels_last(weight: torch.Tensor) -> torch.Tensor:
    """A convolution's weight [K, C, h, w] as cuDNN reads it beside activations that are channels last."""
    return weight if weight.ndim == 2 or weight.shape[2:] == (1, 1) else weight.contiguous(
        memory_format=torch.channels_last)


def concat_rows(weights: tuple[torch.Tensor, ...] | list[torch.Tensor]) -> torch.Tensor:
    """Matrices [K, C] as one [sum of K, C]: a view where they are neighbours in memory, otherwise a copy."""
    ends = [w.data_ptr() + w.nbytes for w in weights]
    together = all(w.is_contiguous() for w in weights) and ends[:-1] == [w.data_ptr() for w in weights[1:]]
    same = len({w.untyped_storage().data_ptr() for w in weights}) == 1
    if not (together and same):
        return torch.cat(weights)
    return weights[0].as_strided((sum(map(len, weights)), weights[0].shape[1]), weights[0].stride())
