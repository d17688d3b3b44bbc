"""Finds a process that hangs: every process tells the others, from a thread, where its training stands.

A process is silent if its thread says nothing (stopped, or its machine lost), and stuck if it stands behind the others,
who wait for it. Either ends the run with a line that names it, in place of a collective call that waits for ever.
"""

import json
import os
import sys
import threading
import time
from contextlib import contextmanager

import torch

_FAILED = 1


class Watchdog:
    """Watches all processes from each of them."""

    def __init__(self, channel, timeout, last_good):
        """`timeout`: seconds without progress; `last_good()`: names the newest checkpoint, for the message."""
        self.rank, self.ranks, self.timeout, self._last_good = channel.rank, channel.ranks, timeout, last_good
        self._place = {"count": 0, "place": "start", "patient": False}
        self._closed = threading.Event()
        self._every = min(5.0, timeout / 8)
        now, start = time.monotonic(), {"beat": 0, **self._place}
        self._reports = {}                               # see `find_stalled`: one that says nothing is silent, too
        self._seen = dict.fromkeys(range(self.ranks), (start, now, now))
        self._heard, self._threads = now, []             # when the store answered last; None: it is gone
        if self.ranks > 1:
            self._store = channel.connect(timeout)
            self._threads = [threading.Thread(target=work, daemon=True) for work in (self._talk, self._judge)]
        for thread in self._threads:
            thread.start()

    def mark(self, place, patient=False):
        """Training has come to `place`. `patient`: it may stay there for as long as it needs."""
        self._place = {"count": self._place["count"] + 1, "place": place, "patient": patient}

    @contextmanager
    def paused(self, place):
        """A part of the run that may take long, on some processes only: evaluation, samples, export."""
        self.mark(place, patient=True)
        yield
        self.mark(f"after {place}")

    def close(self):
        """Stop watching; to be called on every process before any of them ends."""
        self._closed.set()
        for thread in self._threads:
            thread.join()

    def _talk(self):
        """Exchange reports; waits as long as the first process, whose store it is, does not answer."""
        beat, keys = 0, [f"beat/{rank}" for rank in range(self.ranks)]
        while not self._closed.is_set():
            beat += 1
            try:
                self._store.set(keys[self.rank], json.dumps({"beat": beat, **self._place}))
                self._reports = {rank: json.loads(self._store.get(key))
                                 for rank, key in enumerate(keys) if self._store.check([key])}
                self._heard = time.monotonic()
            except torch.distributed.DistError:
                self._heard = None
                return
            self._closed.wait(self._every)

    def _judge(self):
        while not self._closed.wait(self._every):
            now, heard = time.monotonic(), self._heard
            if heard is None or now - heard > self.timeout:
                place = self._reports.get(0, {"place": "its start"})["place"]
                self._end([0], "does not answer", place)
            culprits, what, place = find_stalled(self._seen, self._reports, now, self.timeout)
            if culprits:
                self._end(culprits, what, place)

    def _end(self, culprits, what, place):
        innocent = [rank for rank in range(self.ranks) if rank not in culprits] or [0]
        if self.rank == innocent[0]:
            print(f"sidfast: {'process' if len(culprits) == 1 else 'processes'} "
                  f"{', '.join(map(str, culprits))} {what}; last seen at: {place}. The run ends; the last good "
                  f"checkpoint is {self._last_good()}", file=sys.stderr, flush=True)
        os._exit(_FAILED)                                # the main thread waits in a call that nothing interrupts


def find_stalled(seen, reports, now, timeout):
    """(ranks at fault, what is wrong with them, where they stand), or ([], "", "").

    `seen`: {rank: (report, time of its last beat, time of its last move)}, brought up to date; `reports`: {rank:
    {"beat", "count" of places passed, "place", "patient"}}.
    """
    for rank, report in reports.items():
        old, beat, moved = seen.get(rank, ({}, now, now))
        seen[rank] = (report, now if report["beat"] != old.get("beat") else beat,
                      now if report["count"] != old.get("count") else moved)
    silent = [rank for rank, (_, beat, _) in seen.items() if now - beat > timeout]
    if silent:
        return silent, f"{_have(silent)} not answered for {timeout:g} s", seen[silent[0]][0]["place"]
    if any(report["patient"] or now - beat > timeout / 2 for report, beat, _ in seen.values()):
        return [], "", ""                                # (one that fell silent may have been ahead: soon it is named)
    if seen and all(now - moved > timeout for *_, moved in seen.values()):
        least = min(report["count"] for report, *_ in seen.values())
        stuck = [rank for rank, (report, *_) in seen.items() if report["count"] == least]
        return stuck, f"{_have(stuck)} made no progress for {timeout:g} s", seen[stuck[0]][0]["place"]
    return [], "", ""


def _have(ranks):
    return "has" if len(ranks) == 1 else "have"
