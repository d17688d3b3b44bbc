"""Loss spikes, with the prompts and noise levels that made them, for RUN/spikes.jsonl.

Losses of single samples stay on the device until the log interval; nothing here waits for the device in between.
"""

from collections import deque
from statistics import median

import torch

_WINDOW, _FEWEST, _SAMPLES = 200, 10, 4                  # updates in the median; before it is believed; samples named


class Spikes:
    """Finds updates whose loss is far above the running median of their network's absolute loss."""

    def __init__(self, factor, batches):
        """`factor`: how far, None for never; `batches`: tells a sample's prompt."""
        self.factor, self.batches = factor, batches
        self._history, self._steps = {}, []

    def add(self, step, losses):
        """Keep the per-sample losses of one step: {network: (losses [N], noise levels t [N])} of this process, on the
        device."""
        if self.factor is not None:
            self._steps.append((step, losses))

    def take(self):
        """The spikes since the last call, as JSON values; a collective call. Empty on all processes but the first."""
        if not self._steps:
            return []
        names = list(self._steps[0][1])
        means = torch.stack([torch.stack([losses[name][0].double().mean() for name in names])
                             for _, losses in self._steps])
        torch.distributed.all_reduce(means)
        means = (means / torch.distributed.get_world_size()).tolist()
        found = [(step, name, mean, usual, losses[name])
                 for (step, losses), row in zip(self._steps, means, strict=True)
                 for name, mean in zip(names, row, strict=True) if (usual := self._usual(name, mean)) is not None]
        self._steps = []
        if not found:
            return []
        mine = [self._worst(step, name, *values) for step, name, _, _, values in found]
        everyone = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, mine)
        if torch.distributed.get_rank() > 0:
            return []
        return [{"step": step, "network": name, "loss": mean, "median": usual,
                 "samples": sorted((s for share in shares for s in share), key=lambda s: -abs(s["loss"]))[:_SAMPLES]}
                for (step, name, mean, usual, _), shares in zip(found, zip(*everyone, strict=True), strict=True)]

    def _usual(self, name, mean):
        """The running median of |loss| if this loss is a spike, or None; spikes do not enter the median."""
        history = self._history.setdefault(name, deque(maxlen=_WINDOW))
        usual = median(history) if len(history) >= _FEWEST else None
        if usual is not None and not abs(mean) <= self.factor * usual:
            return usual
        history.append(abs(mean))
        return None

    def _worst(self, step, name, losses, t):
        """This process's samples of largest loss."""
        rows = losses.abs().topk(min(_SAMPLES, len(losses))).indices.tolist()
        losses, t = losses.tolist(), t.tolist()
        return [{"loss": losses[row], "t": t[row], "prompt": self.batches.prompt(step, name, row)} for row in rows]
