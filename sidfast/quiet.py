"""Silence what libraries print at start-up and no user can act on."""

import logging
import os
import warnings


def quieten():
    """Call before the first import of torch, diffusers, transformers or deepspeed."""
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
