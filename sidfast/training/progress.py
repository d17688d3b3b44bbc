"""Where a run stands, and what is known of its losses since the last log line."""

from dataclasses import dataclass, field

import torch
from deepspeed import comm

from sidfast.checkpoints.saver import last_good
from sidfast.common.errors import Diverged
from sidfast.engines.engine import ENGINES

_NETWORKS = ("fake_score", "generator")                  # in the order of `sums`


@dataclass
class Progress:
    """Counters of a run. `sums` collects the losses since the last log line, on the device."""

    step: int = 0
    images: int = 0
    sums: list = field(default_factory=lambda: [0.0] * 4)            # two losses, then two counts of samples left out
    logged: int = 0                                      # the step of the last log line
    skipped: int = 0                                     # updates left out since then, both networks'
    in_a_row: dict = field(default_factory=lambda: dict.fromkeys(ENGINES, 0))          # the same without a break

    @classmethod
    def resume(cls, extra, rank, processes):
        """What a checkpoint holds (`describe`); sums of another number of processes are dealt out evenly. Older ones
        have one count for both networks."""
        sums = [row if len(row) == 4 else [*row[:2], row[2] / 2, row[2] / 2] for row in extra["sums"]]
        if len(sums) != processes:
            total = [sum(column) for column in zip(*sums, strict=True)]
            sums = [[v / len(sums) for v in total[:2]] + [v / processes for v in total[2:]]] * processes
        return cls(extra["step"], extra["images"], sums[rank], extra["logged"], extra["skipped"],
                   dict(extra["in_a_row"]))

    def describe(self, batch_size, saver):
        """JSON values for a checkpoint; a collective call. Raises Diverged as `reduce` does."""
        sums = [None] * comm.get_world_size()
        torch.distributed.all_gather_object(sums, [float(v) for v in self.sums])
        self._check_finite([sum(column) for column in zip(*sums, strict=True)], batch_size, saver)
        return {"step": self.step, "images": self.images, "logged": self.logged, "sums": sums,
                "skipped": self.skipped, "in_a_row": self.in_a_row}

    def add(self, fake_score, generator):
        """The losses of a step's two updates (engines/update.py, UpdateOutput)."""
        news = (fake_score.loss, generator.loss, fake_score.non_finite, generator.non_finite)
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

        Raises Diverged if a network had no finite sample in that time.
        """
        device = next(v.device for v in self.sums if torch.is_tensor(v))
        sums = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device) for v in self.sums])
        comm.all_reduce(sums)
        totals = sums.tolist()
        self._check_finite(totals, batch_size, saver)
        count = (self.step - self.logged) * comm.get_world_size()
        values = {f"{name}_loss": total / count for name, total in zip(_NETWORKS, totals, strict=False)}
        values["non_finite"] = totals[2] + totals[3]
        values |= {f"non_finite/{name}": total for name, total in zip(_NETWORKS, totals[2:], strict=True)}
        values["skipped_updates"] = self.skipped
        self.sums, self.logged, self.skipped = [0.0] * 4, self.step, 0
        return values

    def _check_finite(self, totals, batch_size, saver):
        """Raise Diverged if a network had no finite sample since the last log line; `totals`: `sums` of all
        processes."""
        steps = self.step - self.logged
        lost = [name for name, count in zip(_NETWORKS, totals[2:], strict=True) if 0 < batch_size * steps <= count]
        if not lost:
            return
        what = f"every sample of the {' and the '.join(lost)} in the {'last' if self.logged else 'first'} {steps} steps"
        if self.logged:
            raise diverged(f"{what} was non-finite", self.step, saver)
        raise Diverged(f"{what} was non-finite and was left out; the run ends. Lower learning rates do not help here: "
                       "look at the teacher's own images (`sidfast sample --model TEACHER`), and check its noise "
                       "schedule, what its network predicts (model.scheduler), and the precision (fp16 overflows where "
                       "bf16 and fp32 do not)")


def diverged(what, step, saver):
    """A Diverged that says at which step, and which checkpoint to go on from; waits for one that is being written."""
    saver.wait()
    good = last_good(saver.folder, steady=True)
    advice = "begin again" if good == "none" else "go on from it (--resume PATH)"
    return Diverged(f"{what}: the run has diverged at step {step}. The last good checkpoint is {good}; {advice} with "
                    "lower learning rates and another --out")
