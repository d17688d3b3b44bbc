"""The device that a command runs on."""

import os
import re

import torch

from sidfast.common.errors import UserError


def choose_device(name: str | None = None) -> torch.device:
    """The device called cpu, cuda or cuda:N; by default this process's GPU, or else the CPU. A GPU becomes the current
    one. Raises UserError for another name, and for a GPU that is not there."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name is None and not gpus):
        return torch.device("cpu")
    found = re.fullmatch("cuda(?::([0-9]{1,4}))?", name or "cuda")
    if not found:
        raise UserError(f"--device {name}: must be cpu, cuda or cuda:N")
    number = int(found[1] or os.environ.get("LOCAL_RANK", 0))
    if name is not None and number >= gpus:
        raise UserError(f"--device {name}: there is no such GPU here (of {gpus})")
    torch.cuda.set_device(number)
    return torch.device("cuda", torch.cuda.current_device())
