"""What is wrong with a configuration, in one line that names the key, and the key that may have been meant."""

import difflib
import re
from types import UnionType
from typing import Union, get_args, get_origin

from pydantic import BaseModel

_MEANT = {"learning_rate": "lr", "iterations": "steps"}                          # names that others give to keys
_NO_SECTION = ("model_type", "dict_type")                # pydantic's names of that fault


def explain(validation, of, under=""):
    """One line out of pydantic's ValidationError about the Section `of`: its first fault, or a section that is none.
    `under`: what keys begin with."""
    error = _told(validation, of)
    key = under + ".".join(str(part) for part in _place(error["loc"], of))
    if error["type"] == "extra_forbidden":
        near = _nearest(error["loc"], of)
        return f"unknown key {key}" + (f"; did you mean {under}{near}?" if near else "")
    if error["type"] == "missing":
        return f"{key} is missing"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] in _NO_SECTION:
        return f"{key}: must be a section, not {_short(error['input'])}"
    message = error["msg"][0].lower() + error["msg"][1:]
    if error["type"] == "enum":
        message = message.replace(error["ctx"]["expected"], _distinct(error["ctx"]["expected"]))
    words = "".join(f" or {word}" for word in _words(validation, error, of))
    return f"{key}: {message}{words}, not {_short(error['input'])}"


def _words(validation, error, of):
    """The words, such as 'auto', that could stand in an error's place besides what its message names."""
    place = _place(error["loc"], of)
    return [other["ctx"]["expected"] for other in validation.errors()
            if other["type"] == "literal_error" and other["loc"] != error["loc"] and _place(other["loc"], of) == place]


def _told(validation, of):
    """The first fault; of a union's members, that of one whose type the value has ([H, W] is no wrong number)."""
    first = first_fault(validation)
    if not first["type"].endswith("_type") or first["type"] in _NO_SECTION:
        return first
    place = _place(first["loc"], of)
    same = [e for e in validation.errors() if e["type"] != "literal_error" and _place(e["loc"], of) == place]
    return max([first, *same], key=lambda e: (len(e["loc"]), not e["type"].endswith("_type")))


def first_fault(validation):
    """The error of pydantic's ValidationError that `explain` tells."""
    errors = validation.errors()
    return next((e for e in errors if e["type"] in _NO_SECTION), errors[0])


def _place(location, section):
    """An error's location without what pydantic adds to it: the member of a union that it tried."""
    field = None
    for depth, part in enumerate(location):
        if part not in getattr(section, "model_fields", ()):
            union = field and not section and get_origin(field.annotation) in (Union, UnionType)
            return location[:depth] if union else location
        field = section.model_fields[part]
        section = _section(field.annotation)
    return location


def _section(annotation):
    """The section among the types that a field may have, or None."""
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _distinct(listed):
    """A list in words, such as "0, 1, 2, 3 or 3", with each value once (DeepSpeed has two names for stage 3)."""
    values = list(dict.fromkeys(re.split(", | or ", listed)))
    return " or ".join(part for part in (", ".join(values[:-1]), values[-1]) if part)


def _short(value, limit=80):
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def _nearest(location, of):
    """The valid key most like an unknown one: in its own section, or in any."""
    keys = list(_keys(of))
    siblings = [k for k in keys if k.split(".")[:-1] == [str(p) for p in location[:-1]]]
    name = _MEANT.get(str(location[-1]).lower(), str(location[-1]))
    for candidates in (siblings, keys):
        by_name = {}
        for key in candidates:
            by_name.setdefault(key.split(".")[-1], key)
        match = difflib.get_close_matches(name, by_name, n=1, cutoff=0.6)
        if match:
            return by_name[match[0]]
    return None


def _keys(section, prefix=""):
    for name, field in section.model_fields.items():
        yield prefix + (field.alias or name)
        inner = _section(field.annotation)
        if inner:
            yield from _keys(inner, f"{prefix}{name}.")
