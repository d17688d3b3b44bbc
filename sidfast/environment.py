"""What libraries read from the environment when they are first imported."""

import logging
import os
import warnings


def prepare_environment():
    """Silence what libraries print at start-up and no user can act on, and let OpenMP's threads wait for each other but
    shortly before they sleep: on a machine with other work, spinning ones take the cores from those they wait for.

    Call before the first import of torch, diffusers, transformers or deepspeed.
    """
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
