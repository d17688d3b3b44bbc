"""state.json, a checkpoint's table of contents: what it has to hold, and how it shows that it was damaged itself.

Its first entry, `digest`, is the SHA-256 of all the rest of the file, byte by byte.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sidfast.config.deepspeed import ENGINES

STATE, FORMAT = "state.json", 3
_FILE = re.compile(rf"({'|'.join(ENGINES)})\.([a-z0-9_]+)-([0-9]{{5}})-of-([0-9]{{5}})\.safetensors")
_NEEDED = {(network, kind) for network in ENGINES for kind in ("weights", "exp_avg_sq")} | {("generator", "ema")}
_Count = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)               # (of each part: a 1 is neither True nor "1")


class _File(_Part):
    bytes: _Count
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class _Engine(_Part):
    optimizer_step: _Count
    loss_scale: dict[str, int | float]


class _Progress(_Part):                                  # of progress.py
    step: _Count
    images: _Count
    logged: _Count
    sums: list[Annotated[list[float], Field(min_length=3, max_length=4)]] = Field(min_length=1)
    skipped: _Count
    in_a_row: dict[Literal[ENGINES], _Count]


class _Run(_Part):                                       # of identity.py; absent in checkpoints of older versions
    settings: dict[str, Any]
    inputs: dict[str, Any]


class _State(_Part):
    format: Literal[FORMAT]
    step: _Count
    extra: _Progress
    engines: dict[Literal[ENGINES], _Engine]
    files: dict[str, _File]
    run: _Run | None = None

    @model_validator(mode="after")
    def _whole(self):
        if not set(ENGINES) == self.engines.keys() == self.extra.in_a_row.keys():
            raise ValueError("one of the networks is missing")
        if self.step != self.extra.step:
            raise ValueError(f"step {self.step} or {self.extra.step}")
        found = {}
        for name in self.files:
            network, kind, rank, ranks = _parse(name)
            found.setdefault((network, kind), set()).add((rank, ranks))
        for network, kind in sorted(_NEEDED - found.keys()):
            raise ValueError(f"{network}.{kind} is missing")
        ranks = max(ranks for parts in found.values() for _, ranks in parts)
        for (network, kind), parts in found.items():
            if parts != {(rank, ranks) for rank in range(ranks)}:
                raise ValueError(f"not all files of {network}.{kind} are there")
        return self


def file_name(network, kind, rank, ranks):
    """The file of one process's tensors of a kind."""
    return f"{network}.{kind}-{rank:05d}-of-{ranks:05d}.safetensors"


def files_of(state, network, kind):
    """The names of all files of a kind that a state lists."""
    return [name for name in sorted(state["files"]) if _parse(name)[:2] == (network, kind)]


def seal(state):
    """The text of a state.json."""
    text = json.dumps({"digest": ""} | state, indent=1)
    return text.replace('""', f'"{hashlib.sha256(text.encode()).hexdigest()}"', 1)


def read_state(path):
    """The state.json of a checkpoint's folder. Raises OSError if it is missing, ValueError if it is not what was
    written."""
    raw = (Path(path) / STATE).read_bytes()
    try:
        state = json.loads(raw)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    digest = state.get("digest") if isinstance(state, dict) else None
    if not isinstance(digest, str):
        raise ValueError("it has no checksum")
    if hashlib.sha256(raw.replace(digest.encode(), b"", 1)).hexdigest() != digest:
        raise ValueError("its checksum differs")
    return state


def is_steady(path):
    """Whether a checkpoint's state.json is whole, and no network was leaving its updates out when it was made."""
    try:
        state = read_state(path)
        check_state(state)
    except (OSError, ValueError):
        return False
    return not any(state["extra"]["in_a_row"].values())


def check_state(state):
    """Raise ValueError unless a state has all that a run goes on from."""
    try:
        _State.model_validate(state)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{place}: {first['msg']}" if place else first["msg"].removeprefix("Value error, ")) from None


def _parse(name):
    """(network, kind, rank, ranks) of a file's name. Raises ValueError for any other name, one with a folder above
    all."""
    found = _FILE.fullmatch(name)
    if not found:
        raise ValueError(f"{name!r} is no file of a checkpoint")
    return found[1], found[2], int(found[3]), int(found[4])
