"""Whether DeepSpeed takes a `deepspeed` section: tried on a network of a few parameters before anything is written."""

import contextlib
import os
import tempfile

import torch
from deepspeed import comm
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from pydantic import ValidationError
from torch import nn

from sidfast.common.errors import UserError
from sidfast.common.explain import explain, first_fault
from sidfast.config.schema import Config
from sidfast.engines.engine import ENGINES, build_engine, compute_dtype, engine_config

_WRITERS = ("tensorboard", "csv_monitor", "wandb", "comet", "flops_profiler", "autotuning")


def check_sections(config: Config) -> None:
    """Raise UserError for a `deepspeed` section that DeepSpeed cannot read; builds nothing."""
    joined = comm.get_world_size() if comm.is_initialized() else 1               # (DeepSpeed counts those that have)
    for name in ENGINES:
        section = engine_config(config, name, joined)
        with _refusals(config, name):
            DeepSpeedConfig(section | {"gradient_accumulation_steps": 1})


def validate_deepspeed(config: Config, processes: int, device: torch.device) -> None:
    """Build each engine around a small network and take one step; a collective call, once processes have joined.

    Raises UserError, which names the section and passes DeepSpeed's reason on, for a section that it does not take.
    `check_sections` comes first: it sees all of it, while here what would write files is switched off.
    """
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
    except ValidationError as error:
        raise UserError(_explain(error, config, name)) from None
    except Exception as error:                           # DeepSpeed asserts, and raises Python's own
        where = f"deepspeed (with deepspeed.{name})" if name in config.deepspeed else "deepspeed"
        raise UserError(f"{where}: DeepSpeed does not take this section ({_reason(error)})") from None


def _step(adam, section, device):
    """One optimizer step of an engine of one linear layer, in a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as folder, _inside(folder):
        network = nn.Linear(8, 8, device=device)
        engine = build_engine(network, adam, section, device)
        x = torch.ones(2, 8, device=device, dtype=compute_dtype(section))
        buckets = engine.module.flat.buckets if engine.module.flat else ()
        engine.backward(engine(lambda net, rows: net(rows).float().mean() + sum(c.float().sum() for c in buckets), x))
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
    return f"{lines[0] if lines else 'no reason given'}; {type(error).__name__}"


def _explain(error, config, name):
    """One line out of pydantic's ValidationError about a part of a section, which tells neither where the part stands
    nor what class it has, but for its name."""
    fault = first_fault(error)
    sections = ((f"deepspeed.{name}.", config.deepspeed.get(name, {})), ("deepspeed.", config.deepspeed))
    places = (prefix + place for prefix, section in sections
              for place in _places(section, fault["loc"], fault["input"]))
    place = next(places, "deepspeed.")
    if fault["type"] in ("value_error", "assertion_error"):                      # DeepSpeed's own words, without a key
        return f"{'.'.join((place.rstrip('.'), *map(str, fault['loc'])))}: {fault['msg']}"
    model = next((m for m in _models(DeepSpeedConfigModel) if m.__name__ == error.title), DeepSpeedConfigModel)
    return explain(error, model, place)


def _places(section, location, value, prefix=""):
    """What stands before `location`, keys one inside the other, wherever in nested sections they lead to a value."""
    found = section
    for key in location:
        found = found.get(key) if isinstance(found, dict) else None
    if found is not None and found == value:
        yield prefix
    for key, inner in section.items():
        if isinstance(inner, dict):
            yield from _places(inner, location, value, f"{prefix}{key}.")


def _models(base):
    """A class and all that are derived from it."""
    yield base
    for derived in base.__subclasses__():
        yield from _models(derived)
