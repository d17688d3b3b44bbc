"""Copies of the generator that a source of synthetic data draws with (method.md, section 7): its average, or itself as
it was some updates ago. A copy is a whole network on every process, in the type that networks compute in, whatever the
ZeRO stage; it is brought up to date at the start of each step, in place, so that CUDA graphs may hold it."""

from collections.abc import Callable

import torch

from sidfast.engines.engine import copy_weights, master_weights, scatter


class EmaCopy:
    """The average's weights. They are in every checkpoint anyway."""

    def __init__(self, network, engine, ema, section):
        """`network`: the copy; `engine`, `ema`: the generator's; `section`: the configuration's `synthetic`."""
        self.network, self.engine, self.ema = network, engine, ema

    def follow(self, step: int) -> None:
        """Be what the images of step 0, 1, 2, ... are drawn with; a collective call."""
        copy_weights(self.engine, self.ema.shards, self.network)

    def state(self) -> dict[str, list[torch.Tensor]]:
        """What a checkpoint has to keep besides: {kind: tensors laid out like the generator's masters}."""
        return {}

    def restore(self, step: int, read: Callable[[str], dict[str, torch.Tensor]]) -> None:
        """Go on at a step; `read(kind)` gives whole tensors of the checkpoint, {} for a kind that it lacks."""


class StaleCopy:
    """The generator's weights `stale_by` updates ago, the first ones until there are as many. In host memory is one
    set of this process's fp32 shards every `stale_every` updates."""

    def __init__(self, network, engine, ema, section):
        """As EmaCopy's."""
        self.network, self.engine, self.by, self.every = network, engine, section.stale_by, section.stale_every
        self.shards, self._shown = {}, None              # {updates made: shards}, and which of them the network has

    def follow(self, step: int) -> None:
        """As EmaCopy's."""
        if step % self.every == 0:
            self.shards[step] = [m.detach().to("cpu", copy=True) for m in master_weights(self.engine)]
        version = self._oldest(step)
        for passed in [v for v in self.shards if v < version]:
            del self.shards[passed]
        if version != self._shown:
            copy_weights(self.engine, self.shards[version], self.network)
            self._shown = version

    def _oldest(self, step):
        """The updates made when the copy that step needs was taken."""
        return max(0, (step - self.by) // self.every * self.every)

    def state(self) -> dict[str, list[torch.Tensor]]:
        """As EmaCopy's: the weights that later steps will draw with."""
        return {_kind(version): shards for version, shards in self.shards.items()}

    def restore(self, step: int, read: Callable[[str], dict[str, torch.Tensor]]) -> None:
        """As EmaCopy's. A checkpoint of a run without such copies stands for all that are missing with its own
        weights."""
        for version in range(self._oldest(step), step, self.every):
            shards = [m.detach().to("cpu", copy=True) for m in master_weights(self.engine)]
            whole = read(_kind(version))
            if whole:
                scatter(self.engine, whole, shards)
            self.shards[version] = shards


COPIES = {"ema": EmaCopy, "stale": StaleCopy}            # by Source.copy


def _kind(version):
    return f"stale_{version:08d}"
