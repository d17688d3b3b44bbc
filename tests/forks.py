"""Commands forked from this process, which has the libraries loaded: a start of PyTorch and DeepSpeed takes seconds.

    python tests/forks.py FOLDER

It makes FOLDER/socket, takes a line of JSON from each connection ({"program": "train", "cli" or the path of a script,
"arguments", "environment", "output": path, "errors": path}) and answers with the process id. When a command has ended,
its exit code is in ERRORS.code. The end of standard input ends this process.
"""

import gc
import json
import os
import runpy
import select
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

from sidfast.common.environment import prepare_environment  # noqa: E402

prepare_environment()
os.fsync = os.fstat                                      # (as in conftest.py)

# Loaded once, for all that are forked: also what is loaded late, with the first engine, export and report.
import deepspeed.module_inject.auto_ep_layer  # noqa: E402
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402, F401
import diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion  # noqa: E402, F401
import matplotlib.backends.backend_agg  # noqa: E402
import matplotlib.backends.backend_svg  # noqa: E402, F401
import torch  # noqa: E402
import torch.utils.tensorboard  # noqa: E402

import sidfast.cli  # noqa: E402
import sidfast.train  # noqa: E402
import sidfast.training.launch  # noqa: E402


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


def main(folder):
    """Until standard input ends."""
    errors = {}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/starting")
        listener.listen(64)
        os.rename(f"{folder}/starting", f"{folder}/socket")
        while True:
            ready = select.select([0, listener], [], [], 0.02 if errors else None)[0]
            if 0 in ready:
                return
            if listener in ready:
                connection = listener.accept()[0]
                with connection, connection.makefile("rw") as stream:
                    job = json.loads(stream.readline())
                    pid = fork(**job)
                    errors[pid] = job["errors"]
                    stream.write(f"{pid}\n")
            while errors:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    break
                code = Path(errors.pop(pid) + ".code")
                code.with_suffix(".partial").write_text(str(os.waitstatus_to_exitcode(status)))
                code.with_suffix(".partial").rename(code)


if __name__ == "__main__":
    gc.freeze()                                          # (forked processes need not look through the libraries)
    main(sys.argv[1])
