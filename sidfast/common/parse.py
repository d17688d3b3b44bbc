"""JSON that a person wrote: stricter than the standard library, with the place of a fault in the message."""

import json
import math

from sidfast.common.errors import UserError


def parse_json(text, source):
    """The value of a JSON text; `source` opens the messages.

    Raises UserError for what is no JSON, a key given twice in one section, and characters that no file or terminal can
    hold. NaN and Infinity pass; `check_finite` finds them.
    """
    try:
        value = json.loads(text, object_pairs_hook=lambda pairs: _object(pairs, source))
        _check(value, source, "")
    except json.JSONDecodeError as error:
        raise UserError(f"{source}, line {error.lineno}: not JSON ({error.msg})") from None
    except RecursionError:
        raise UserError(f"{source}: sections are nested too deep") from None
    except ValueError:                                   # Python's limit on the digits of an integer
        raise UserError(f"{source}: a number has too many digits") from None
    return value


def check_finite(value, place):
    """Raise ValueError, naming the key, for a number in nested sections or lists that is not finite."""
    if isinstance(value, dict):
        for key, item in value.items():
            check_finite(item, f"{place}.{key}")
    elif isinstance(value, list):
        for item in value:
            check_finite(item, place)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{place}: must be a finite number, not {value!r}")


def _object(pairs, source):
    seen = dict(pairs)
    if len(seen) < len(pairs):
        names = [name for name, _ in pairs]
        _refuse(source, f"{next(n for n in names if names.count(n) > 1)!r} is given twice in one section")
    return seen


def _check(value, source, place):
    if isinstance(value, dict):
        for key, item in value.items():
            _check(key, source, place)
            _check(item, source, f"{place}.{key}" if place else key)
    elif isinstance(value, list):
        for item in value:
            _check(item, source, place)
    elif isinstance(value, str) and ("\0" in value or any("\ud800" <= c <= "\udfff" for c in value)):
        _refuse(source, f"{place or 'the text'} has a character that no file can hold ({value[:40]!a})")


def _refuse(source, fault):
    raise UserError(f"{source}: {fault}")
