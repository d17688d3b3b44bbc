"""What GPU memory holds at a run's worst moment, by the line of code that took it; options as of sidfast/train.py:

    deepspeed --num_gpus 2 bench/peak.py peak.txt --config configs/sd15.json --out RUN --set train.steps=2 ...

The history of the allocator makes a run slower. First process only; tensors of other libraries count as well.
"""

import collections
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
_OURS = ("/sidfast/", "/deepspeed/")                     # frames worth naming
_FRAMES = 5                                              # of them, innermost first
_EVENTS = 4_000_000                                      # of the history that are kept


def live_at_peak(trace):
    """(bytes, {where: bytes}) of what is allocated when most is, the largest first.

    `trace`: events of one device in order, as `torch.cuda.memory._snapshot()["device_traces"]` has them. An allocation
    that was made before the first event is not seen.
    """
    live, total, most, until = {}, 0, 0, 0
    for number, event in enumerate(trace, 1):
        if event["action"] == "alloc":
            live[event["addr"]] = event["size"]
            total += event["size"]
        elif event["action"] == "free_completed":
            total -= live.pop(event["addr"], 0)
        if total > most:
            most, until = total, number
    held = {}
    for event in trace[:until]:
        if event["action"] == "alloc":
            held[event["addr"]] = event
        elif event["action"] == "free_completed":
            held.pop(event["addr"], None)
    sizes = collections.Counter()
    for event in held.values():
        sizes[_where(event["frames"])] += event["size"]
    return most, dict(sizes.most_common())


def _where(frames):
    """The innermost frames of a stack that are of this package or of DeepSpeed, in one line."""
    named = [f"{'/'.join(f['filename'].split('/')[-2:])}:{f['line']} {f['name']}" for f in frames
             if any(part in f["filename"] for part in _OURS)]
    return " < ".join(named[:_FRAMES]) or "elsewhere"


def main(report, *arguments):
    """Run sidfast/train.py with `arguments`, then write the report. Returns the run's exit code."""
    import torch

    from sidfast.train import main as train

    rank = int(os.environ.get("LOCAL_RANK", 0))
    torch.cuda.set_device(rank)
    torch.cuda.memory._record_memory_history(enabled="all", context="alloc", stacks="python", max_entries=_EVENTS)
    try:
        return train(list(arguments))
    finally:
        if rank == 0:
            most, sizes = live_at_peak(torch.cuda.memory._snapshot()["device_traces"][rank])
            rows = [f"{size / 2**30:8.3f}  {where}" for where, size in sizes.items()]
            Path(report).write_text("\n".join([f"{most / 2**30:8.3f}  GiB in all", *rows]) + "\n")


if __name__ == "__main__":
    local = [a for a in sys.argv[1:] if a.startswith("--local_rank")]            # the launcher puts it first
    sys.exit(main(*[a for a in sys.argv[1:] if a not in local], *local))
