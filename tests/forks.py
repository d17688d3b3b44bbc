"""Commands forked from this process, which has the libraries loaded: a start of PyTorch and DeepSpeed takes seconds.

It says which folder its commands may write to, then reads lines of JSON on standard input: {"program": "train", "cli"
or the path of a script, "arguments", "environment", "output": path, "errors": path}. It answers with the process id,
and writes the exit code to ERRORS.code in the end.
"""

import gc
import json
import os
import runpy
import select
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

from sidfast.common.environment import prepare_environment  # noqa: E402

prepare_environment()

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402, F401 (DeepSpeed loads it with its first engine: seconds)
import torch  # noqa: E402
import torch.utils.tensorboard  # noqa: E402

import sidfast.cli  # noqa: E402
import sidfast.train  # noqa: E402
import sidfast.training.launch  # noqa: E402 (loaded once, for all that are forked)


def run(program, arguments):
    """Returns the exit code."""
    if program in ("train", "cli"):
        return getattr(sidfast, program).main(arguments)
    sys.argv = [program, *arguments]
    runpy.run_path(program, run_name="__main__")
    return 0


def fork(program, arguments, environment, output, errors):
    """The process id of `program`, which writes to the ends of two files."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        for number, path in enumerate((os.devnull, output, errors)):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644), number)
        os.environ.clear()
        os.environ |= environment
        os.chdir(ROOT)
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
        code = run(program, arguments)
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main():
    """Until standard input ends."""
    errors = {}
    while True:
        if select.select([0], [], [], 0.02 if errors else None)[0]:
            line = sys.stdin.buffer.raw.readline()
            if not line:
                return
            job = json.loads(line)
            pid = fork(**job)
            errors[pid] = job["errors"]
            print(pid, flush=True)
        while errors:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            code = Path(errors.pop(pid) + ".code")
            code.with_suffix(".partial").write_text(str(os.waitstatus_to_exitcode(status)))
            code.with_suffix(".partial").rename(code)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="forks-") as folder:
        print(folder, flush=True)
        gc.freeze()                                      # (forked processes need not look through the libraries)
        main()
