"""Whether DeepSpeed takes a `deepspeed` section: tried on a network of a few parameters before anything is written."""

import contextlib
import os
import tempfile

import torch
from deepspeed.runtime.config import DeepSpeedConfig
from torch import nn

from sidfast.errors import UserError
from sidfast.training.engines import ENGINES, build_engine, compute_dtype, engine_config

_WRITERS = ("tensorboard", "csv_monitor", "wandb", "comet", "flops_profiler", "autotuning")


def check_sections(config, processes):
    """Raise UserError for a `deepspeed` section that DeepSpeed cannot read; builds nothing."""
    for name in ENGINES:
        section = engine_config(config, name, processes)
        with _refusals(config, name):
            DeepSpeedConfig(section | {"gradient_accumulation_steps": 1})


def probe_engines(config, processes, device):
    """Build each engine around a small network and take one step; a collective call, once processes have joined.

    Raises UserError, which names the section and passes DeepSpeed's reason on, for a section that it does not take.
    """
    check_sections(config, processes)                    # all of it, before what would write files is switched off
    for name in ENGINES:
        section = engine_config(config, name, processes) | {"gradient_accumulation_steps": 1}
        quiet = {w: section[w] | {"enabled": False} for w in _WRITERS if isinstance(section.get(w), dict)}
        with _refusals(config, name):
            _step(getattr(config.optimizer, name), section | quiet, device)


@contextlib.contextmanager
def _refusals(config, name):
    """Turns whatever DeepSpeed raises into a UserError that names the section."""
    try:
        yield
    except Exception as error:                           # DeepSpeed asserts, and raises pydantic's and Python's own
        where = f"deepspeed (with deepspeed.{name})" if name in config.deepspeed else "deepspeed"
        raise UserError(f"{where}: DeepSpeed does not take this section ({_reason(error)})") from None


def _step(adam, section, device):
    """One optimizer step of an engine of one linear layer, in a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as folder, _inside(folder):
        network = nn.Linear(8, 8, device=device)
        engine = build_engine(network, adam, section, device)
        x = torch.ones(2, 8, device=device, dtype=compute_dtype(section))
        chunks = engine.module.flat.chunks if engine.module.flat else ()
        engine.backward(engine(lambda unet, rows: unet(rows).float().mean() + sum(c.float().sum() for c in chunks), x))
        engine.step()
        engine.destroy()


@contextlib.contextmanager
def _inside(folder):
    """The current directory for a while."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _reason(error):
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if type(error).__name__ == "ValidationError":        # pydantic: a count, then key and fault line by line
        lines = [f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']}" for e in error.errors()]
    return f"{lines[0] if lines else 'no reason given'}; {type(error).__name__}"
