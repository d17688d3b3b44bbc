"""Weights in the form that passes read, made once for many passes.

A parameter lies in memory as DeepSpeed keeps it, plain and contiguous. Passes want convolutions' weights channels last,
attention's projections as one matrix, a 3x3 kernel after an upsampling as a 2x2 one. Making these takes bandwidth and
launches in every pass, though weights change once a step. Networks that DeepSpeed does not keep have their convolutions
channels last to begin with (`frozen_layout`), and no second copy of those.
"""

import torch


class Packed:
    """A module that reads `make_packed()`, a tuple of tensors, instead of its parameters.

    Until `repack` is first called they are made anew in every pass. From then on they are kept, and must be made again
    after every change of a parameter: in place, so that CUDA graphs may hold them.
    """

    kept = None

    def make_packed(self):
        """The tensors that passes read, out of the parameters."""
        raise NotImplementedError

    @torch.no_grad()
    def packed(self):
        """What this module's passes read."""
        return self.make_packed() if self.kept is None else self.kept

    @torch.no_grad()
    def repack(self):
        """Keep what the parameters give now."""
        made = self.make_packed()
        if self.kept is None or any((a.dtype, a.device) != (b.dtype, b.device)
                                    for a, b in zip(self.kept, made, strict=True)):
            self.kept = made
        else:
            for old, new in zip(self.kept, made, strict=True):
                if old is not new:                       # (a parameter that lies as passes want it)
                    old.copy_(new)


def repack(unet):
    """Bring up to date what a fused UNet keeps; call it after every change of its parameters. Others have nothing."""
    for module in unet.modules():
        if isinstance(module, Packed):
            module.repack()


def frozen_layout(unet):
    """Lay a UNet's convolutions out as its passes read them, in place; for a network outside DeepSpeed's engines."""
    return unet.to(memory_format=torch.channels_last)


def packed_bytes(unet):
    """Bytes of what a UNet keeps besides its parameters."""
    own = {p.data_ptr() for p in unet.parameters()}
    return sum(t.nbytes for m in unet.modules() if isinstance(m, Packed) for t in m.kept or ()
               if t.data_ptr() not in own)


def channels_last(weight):
    """A convolution's weight as cuDNN reads it beside activations that are channels last."""
    return weight if weight.shape[2:] == (1, 1) else weight.contiguous(memory_format=torch.channels_last)
