"""An exponential moving average of the generator, kept in fp32 on the optimizer's own shards.

Half-life and ramp-up are counted in images (method.md, section 8): half_life = min(half_life, ramp_up * images seen).
"""

import torch

from sidfast.training.engines import gather, masters, scatter


class Ema:
    """The average; every process holds the part that belongs to its shards."""

    def __init__(self, engine, half_life, ramp_up):
        self.engine, self.half_life, self.ramp_up = engine, half_life, ramp_up
        self.shards = [m.detach().clone() for m in masters(engine)]

    def decay(self, batch_size, images):
        """The weight of the old average when `images` have been seen, the last `batch_size` of them since."""
        half_life = self.half_life if self.ramp_up is None else min(self.half_life, self.ramp_up * images)
        return 0.5 ** (batch_size / max(half_life, 1e-8))

    @torch.no_grad()
    def update(self, batch_size, images):
        """Follow the generator by one step."""
        torch._foreach_lerp_(self.shards, [m.detach() for m in masters(self.engine)],
                             1 - self.decay(batch_size, images))

    def gather(self, keep=lambda name: True):
        """Whole averaged weights {name: fp32, CPU}; a collective call, see `engines.gather`."""
        return gather(self.engine, self.shards, keep)

    def restore(self, full):
        """Set the average from whole weights."""
        scatter(self.engine, full, self.shards)
