"""What libraries read from the environment when they are first imported, and what launchers write into it."""

import importlib.util
import logging
import os
import re
import sys
import warnings
from pathlib import Path

from sidfast.common.errors import UserError

# Where launchers that set no WORLD_SIZE write how many processes they start: SLURM of the step, of the job; MPI.
_STARTED = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def use_utf8():
    """Restart a program in Python's UTF-8 mode if its locale knows ASCII alone (LC_ALL=C): names of files and prompts
    have other characters. For programs' own command lines; Python 3.15 is in that mode by default."""
    if sys.getfilesystemencoding() not in ("ascii", "us-ascii"):
        return
    os.environ["PYTHONUTF8"] = "1"                       # for the processes that it starts
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def hide_checkout():
    """Take a checkout off sys.path, where `python -m`, `python -c` and launchers of several machines put the current
    folder: its folder kernels, which is `sidfast.kernels`, would hide the package `kernels`, which diffusers and
    transformers look for.

    Call before the first import of either.
    """
    kernels = importlib.util.find_spec("sidfast.kernels")
    checkout = Path(kernels.origin).resolve().parents[1] if kernels else None
    if checkout != Path(__file__).resolve().parent:      # (or else the package is installed as a whole)
        sys.path[:] = [place for place in sys.path if Path(place).resolve() != checkout]


def prepare_environment():
    """Silence what libraries print at start-up and no user can act on, and let OpenMP's threads wait for each other but
    shortly before they sleep: on a machine with other work, spinning ones take the cores from those they wait for.
    Hides the checkout (`hide_checkout`).

    Call before the first import of torch, diffusers, transformers or deepspeed.
    """
    if hasattr(sys.stdout, "reconfigure"):               # a character that a terminal lacks is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
    hide_checkout()
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")          # as ever; Triton 3.9 warns that it will change
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)           # "No CUDA runtime is found"
    logging.getLogger("xformers").setLevel(logging.ERROR)                # "can't load C++ extensions", without a GPU
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def choose_accelerator():
    """Keep DeepSpeed from looking for a GPU, and warning, where PyTorch sees none. Call before DeepSpeed's import."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def check_environment(training=False):
    """Raise UserError for what the environment says of processes, threads and ports, if it cannot be so.

    Call before the first import of torch, which reads some of it. `training`: also for several processes that do not
    know of each other; each would train alone, all into one folder.
    """
    if training and "WORLD_SIZE" not in os.environ:
        for name in _STARTED:
            if re.fullmatch("[0-9]{1,9}", text := os.environ.get(name, "")):
                if int(text) > 1:
                    raise UserError(f"{name}={text}, but WORLD_SIZE is not set: the {text} processes would each train "
                                    "alone. Start them with deepspeed or torchrun, or with WORLD_SIZE=$SLURM_NTASKS "
                                    "RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID (docs/reliability.md); for one "
                                    "process alone, set WORLD_SIZE=1")
                break
    processes = _whole("WORLD_SIZE", 1, 10**6)
    for name, least, most in (("RANK", 0, processes - 1), ("LOCAL_RANK", 0, processes - 1), ("LOCAL_SIZE", 1, 10**6),
                              ("LOCAL_WORLD_SIZE", 1, 10**6), ("MASTER_PORT", 0 if processes == 1 else 1, 65535)):
        _whole(name, least, most)
    omp_threads()


def omp_threads():
    """The threads of OMP_NUM_THREADS, the first number if it is a list, as OpenMP allows; None unless given. Raises
    UserError."""
    text = os.environ.get("OMP_NUM_THREADS", "")
    numbers = [part.strip() for part in text.split(",")]
    if not text:
        return None
    if not all(re.fullmatch("[0-9]{1,6}", number) and int(number) for number in numbers):
        raise UserError(f"OMP_NUM_THREADS={text}: must be a number of threads, at least 1")
    return int(numbers[0])


def _whole(name, least, most):
    """The whole number that a variable gives, or else 1."""
    text = os.environ.get(name)
    if text is None:
        return 1
    if not re.fullmatch("[0-9]{1,9}", text) or not least <= int(text) <= most:
        words = f"below WORLD_SIZE ({most + 1})" if name in ("RANK", "LOCAL_RANK") else f"{least} to {most}"
        raise UserError(f"{name}={text}: must be a whole number, {words}")
    return int(text)
