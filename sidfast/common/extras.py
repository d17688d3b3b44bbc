"""Libraries that only some commands need: the extras of pyproject.toml."""

import importlib

from sidfast.common.errors import UserError


def need(name, extra, what):
    """Import the module `name` and return it. Raises UserError if it is missing or broken: `what` needs it, and which
    extra of this package installs it."""
    library = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == library
        why = "is not installed" if missing else f"cannot be imported ({str(error).partition(chr(10))[0]})"
        raise UserError(f"{what} needs {library}, which {why}: pip install 'sidfast[{extra}]'") from None
