"""An orderly stop: on SIGTERM, SIGUSR1 or SIGINT (Ctrl-C) to any process, all of them end at the same step.

Also the tie to DeepSpeed's launcher, whose processes must not train on without it: two jobs would write one folder.
"""

import contextlib
import ctypes
import os
import signal
import time

import psutil
import torch

from sidfast.common.errors import speaks

FAULT = "a fault"                                        # in place of a signal's name
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_FAULT_NUMBER = 1000                                     # above those of signals
_PR_SET_PDEATHSIG = 1
_SOON = 1                                                # seconds: a launcher passes on the Ctrl-C that came by itself


class Stop:
    """Says at every step whether to stop; `with` it, signals are its own.

    `saves`: whether a stop saves first; `ending`: whether the last step has been made; `save_due`: whether any process
    asked for a checkpoint (`should_stop`).
    """

    def __init__(self, last=False):
        """`last`: the process ends with this run, and its exit code says how the run ended: signals that come later
        change nothing."""
        self._last, self._asked, self._interrupted, self._agreement = last, 0, None, None
        self.saves, self.ending, self.save_due = True, False, False

    def __enter__(self):
        """A collective call, in the main thread."""
        self._flags = torch.zeros(2, dtype=torch.int32)  # (the signal, whether a checkpoint is due)
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

    def should_stop(self, fault=False, save=False):
        """The name of the signal that ends the run, or None; a collective call at the end of each step. FAULT if any
        process has a `fault`: it will soon be unable to go on. `save`: this process asks for a checkpoint.

        The answer is that to the question of the step before, so that no process waits for another: a signal ends the
        run two steps later at most, and with the same step everywhere.
        """
        self._look_for_launcher()
        asked = _FAULT_NUMBER if fault else self._asked
        before, self._flags = self._answer(), torch.tensor([asked, save], dtype=torch.int32)
        if self._group is None:
            before = self._flags.tolist()
        else:
            self._agreement = torch.distributed.all_reduce(self._flags, torch.distributed.ReduceOp.MAX, self._group,
                                                           async_op=True)
        self.save_due = bool(before[1])
        return _name(before[0])

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
        return self._flags.tolist()

    def _ask(self, number, frame):
        self._asked = self._asked or number
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self._interrupted is None:
            self._interrupted = now
            self._answer_at_once()
        elif now - self._interrupted > _SOON:            # Ctrl-C for the second time: now
            raise KeyboardInterrupt

    def _answer_at_once(self):
        what = "the run is over and writes its last files" if self.ending else "stopping after this step"
        what += " and saving; again: stop now without saving" if self.saves and not self.ending else "; again: stop now"
        if speaks():
            with contextlib.suppress(OSError):           # (print might have been interrupted itself)
                os.write(2, f"\nsidfast: {what}\n".encode())

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
