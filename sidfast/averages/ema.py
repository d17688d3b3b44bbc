"""An exponential moving average of the generator, kept in fp32 on the optimizer's own shards.

    average <- d average + (1 - d) weights        d = 0.5^(batch / h)        h = min(half_life, ramp_up images)

All counted in images, `images` those seen so far; the paper's half-life and ramp-up are in method.md, section 8.
"""

from collections.abc import Callable

import torch

from sidfast.engines.engine import gather, master_weights, scatter


class Ema:
    """The average; every process holds the part that belongs to its shards."""

    def __init__(self, engine, half_life, ramp_up):
        """Begins as the engine's weights. `half_life`: in images; `ramp_up`: a factor, or None for none."""
        self.engine, self.half_life, self.ramp_up = engine, half_life, ramp_up
        self.shards = [m.detach().clone() for m in master_weights(engine)]

    def decay(self, batch_size: int, images: int) -> float:
        """d, the weight of the old average when `images` have been seen, the last `batch_size` of them since."""
        half_life = self.half_life if self.ramp_up is None else min(self.half_life, self.ramp_up * images)
        return 0.5 ** (batch_size / max(half_life, 1e-8))

    @torch.no_grad()
    def update(self, batch_size: int, images: int) -> None:
        """Follow the generator by one step of `batch_size` images, which makes `images` in all."""
        torch._foreach_lerp_(self.shards, [m.detach() for m in master_weights(self.engine)],
                             1 - self.decay(batch_size, images))

    def gather(self, keep: Callable[[str], bool] = lambda name: True) -> dict[str, torch.Tensor]:
        """Whole averaged weights {name: fp32, CPU}; a collective call, see `engines.gather`."""
        return gather(self.engine, self.shards, keep)

    def restore(self, full: dict[str, torch.Tensor]) -> None:
        """Set the average from whole weights {name: tensor}. Raises KeyError for one that is missing."""
        scatter(self.engine, full, self.shards)
