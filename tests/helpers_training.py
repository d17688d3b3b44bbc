"""Training in this process, as the command does it, with a look at what it was made of."""

import signal

import pytest
from conftest import process_alone
from sidfast.kernels import backend

from sidfast import train
from sidfast.accel import plan as speed
from sidfast.monitoring.shutdown import _SIGNALS
from sidfast.training.loop import Loop


def train_here(config, out, *options, code=0, patches=()):
    """Train on the plain references, as a machine without a GPU does; the run's Loop (None if it came to none).

    `options`: of the command; `code`: the exit code that it must have; `patches`: (object, attribute, value) for as
    long as it trains.
    """
    loops, call, handlers = [], Loop.__call__, {number: signal.getsignal(number) for number in _SIGNALS}

    def seen(loop):
        loops.append(loop)
        return call(loop)

    with pytest.MonkeyPatch.context() as patch:
        process_alone(patch)
        for module in (backend, speed):
            patch.setattr(module, "INTERPRETED", False)
        patch.setattr(Loop, "__call__", seen)
        for where, name, value in patches:
            patch.setattr(where, name, value)
        try:
            assert train.main(["--config", str(config), "--out", str(out), *map(str, options)]) == code
        finally:
            for number, handler in handlers.items():     # (the end of a run ignores them)
                signal.signal(number, handler)
    return loops[0] if loops else None
