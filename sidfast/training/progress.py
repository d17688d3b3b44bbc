"""Where a run stands, and what is known of its losses since the last log line."""

from dataclasses import dataclass, field

import torch
from deepspeed import comm

from sidfast.errors import Diverged
from sidfast.training.engines import ENGINES
from sidfast.training.saver import last_good

_LOSSES = ("fake_score_loss", "generator_loss", "non_finite")


@dataclass
class Progress:
    """Counters of a run. `sums` collects the losses since the last log line, on the device."""

    step: int = 0
    images: int = 0
    sums: list = field(default_factory=lambda: [0.0, 0.0, 0.0])
    logged: int = 0                                      # the step of the last log line
    skipped: int = 0                                     # updates left out since then, both networks'
    in_a_row: dict = field(default_factory=lambda: dict.fromkeys(ENGINES, 0))          # the same without a break

    @classmethod
    def resume(cls, extra, rank, processes):
        """What a checkpoint holds (`describe`); sums of another number of processes are dealt out evenly."""
        sums = extra["sums"]
        if len(sums) != processes:
            mean, total = [sum(c) / len(sums) for c in zip(*sums, strict=True)], sum(row[2] for row in sums)
            sums = [[mean[0], mean[1], total / processes]] * processes
        return cls(extra["step"], extra["images"], sums[rank], extra["logged"], extra["skipped"],
                   dict(extra["in_a_row"]))

    def describe(self):
        """JSON values for a checkpoint; a collective call."""
        sums = [None] * comm.get_world_size()
        torch.distributed.all_gather_object(sums, [float(v) for v in self.sums])
        return {"step": self.step, "images": self.images, "logged": self.logged, "sums": sums,
                "skipped": self.skipped, "in_a_row": self.in_a_row}

    def add(self, fake_score, generator):
        """The losses of a step's two updates (method/distill.py, Sums)."""
        news = (fake_score.loss, generator.loss, fake_score.non_finite + generator.non_finite)
        self.sums = [old + new for old, new in zip(self.sums, news, strict=True)]

    def count_skipped(self, name, skipped, most, saver):
        """Count an update that its optimizer left out. Raises Diverged after too many of them in a row."""
        self.skipped += skipped
        self.in_a_row[name] = self.in_a_row[name] + 1 if skipped else 0
        if self.in_a_row[name] >= most:
            raise diverged(f"the last {most} updates of the {name} had a gradient that is not finite and were left out",
                           self.step + 1, saver)

    def reduce(self, batch_size, saver):
        """{name: mean} over the steps since the last log line and over processes; resets the sums.

        Raises Diverged if not a single sample in that time was finite.
        """
        device = next(v.device for v in self.sums if torch.is_tensor(v))
        sums = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device) for v in self.sums])
        comm.all_reduce(sums)
        steps, processes = self.step - self.logged, comm.get_world_size()
        fake, gen, non_finite = sums.tolist()
        skipped = self.skipped
        self.sums, self.logged, self.skipped = [0.0, 0.0, 0.0], self.step, 0
        if non_finite >= 2 * batch_size * steps:
            raise diverged(f"every sample of the last {steps} steps was non-finite", self.step, saver)
        losses = dict(zip(_LOSSES, (fake / steps / processes, gen / steps / processes, non_finite), strict=True))
        return losses | {"skipped_updates": skipped}


def diverged(what, step, saver):
    """A Diverged that says at which step, and which checkpoint to go on from; waits for one that is being written."""
    saver.wait()
    good = last_good(saver.folder, steady=True)
    advice = "begin again" if good == "none" else "go on from it (--resume PATH)"
    return Diverged(f"{what}: the run has diverged at step {step}. The last good checkpoint is {good}; {advice} with "
                    "lower learning rates and another --out")
