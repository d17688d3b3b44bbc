"""An orderly stop: on SIGTERM, SIGUSR1 or SIGINT (Ctrl-C) to any process, all of them end at the same step.

Also the tie to DeepSpeed's launcher, whose processes must not train on without it: two jobs would write one folder.
"""

import ctypes
import os
import signal
import time

import psutil
import torch

FAULT = "a fault"                                        # in place of a signal's name
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_FAULT_NUMBER = 1000                                     # above those of signals
_PR_SET_PDEATHSIG = 1


class Stop:
    """Says at every step whether to stop; `with` it, signals are its own."""

    def __init__(self, last=False):
        """`last`: the process ends with this run, and its exit code says how the run ended: signals that come later
        change nothing."""
        self._last, self._asked, self._agreement = last, 0, None

    def __enter__(self):
        """A collective call, in the main thread."""
        self._flag = torch.zeros((), dtype=torch.int32)
        several = torch.distributed.get_world_size() > 1
        self._group = torch.distributed.new_group(backend="gloo") if several else None
        self._launcher, self._looked = _tie_to_launcher(), 0.0
        # (Ctrl-C is not for background jobs, which ignore it; but a launcher ends at it all the same)
        self._handlers = {number: signal.signal(number, self._ask) for number in _SIGNALS
                          if signal.getsignal(number) != signal.SIG_IGN or self._launcher}
        return self

    def __exit__(self, kind, *_):
        """Give the signals back to whoever had them; of a process that ends, ignore them."""
        if self._last and kind is not None:              # (a fault is told yet, which a second Ctrl-C may cut short)
            return
        for number, handler in self._handlers.items():   # (Python gives its own handlers up before it has ended)
            signal.signal(number, signal.SIG_IGN if self._last else handler)

    def should_stop(self, fault=False):
        """The name of the signal that ends the run, or None; a collective call at the end of each step. FAULT if any
        process has a `fault`: it will soon be unable to go on.

        The answer is that to the question of the step before, so that no process waits for another: a signal ends the
        run two steps later at most, and with the same step everywhere.
        """
        self._look_for_launcher()
        asked = _FAULT_NUMBER if fault else self._asked
        if self._group is None:
            return _name(asked)
        before = self._answer()
        self._flag = torch.tensor(asked, dtype=torch.int32)
        self._agreement = torch.distributed.all_reduce(self._flag, torch.distributed.ReduceOp.MAX, self._group,
                                                       async_op=True)
        return _name(before)

    @property
    def asked(self):
        """The name of the first signal that has reached this process, or None."""
        return _name(self._asked)

    def finish(self):
        """Ask no more; a collective call when the run has ended."""
        self._answer()

    def _answer(self):
        if self._agreement is not None:
            self._agreement.wait()
            self._agreement = None
        return int(self._flag)

    def _ask(self, number, frame):
        if number == self._asked == signal.SIGINT:       # Ctrl-C for the second time: now
            raise KeyboardInterrupt
        self._asked = self._asked or number

    def _look_for_launcher(self):
        """A run whose `deepspeed` command was ended stops as if the signal had reached it."""
        now = time.monotonic()
        if self._launcher and now - self._looked > 1:
            self._looked = now
            process, parent = self._launcher
            if process.ppid() != parent:
                self._asked = self._asked or signal.SIGTERM


def _name(number):
    if number == _FAULT_NUMBER:
        return FAULT
    return signal.Signals(number).name if number else None


def _tie_to_launcher():
    """If this process is a child of DeepSpeed's launcher: end with it. Returns (launcher, its parent's id), or None."""
    try:
        parent = psutil.Process(os.getppid())
        if "deepspeed.launcher.launch" not in parent.cmdline():
            return None
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)           # (Linux; TERM is forwarded)
        started = parent.parent()
        if started and any(os.path.basename(word) == "deepspeed" for word in started.cmdline()[:3]):
            return parent, started.pid
        if parent.ppid() == 1:                           # its command ended while this process was starting
            return parent, None
    except (psutil.Error, AttributeError):
        pass
    return None
