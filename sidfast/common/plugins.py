"""`--import MODULE`: code of the user's own, whose classes are new densities, sources and degradations."""

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path

from sidfast.common.errors import UserError, one_line


def add_import_option(parser):
    """`--import` of a command that reads a configuration."""
    parser.add_argument("--import", action="append", default=[], dest="imports", metavar="MODULE",
                        help="import a module, by its name or as a .py file, before the configuration is read: it may "
                             "define densities and sources (docs/ablations.md)")


def import_modules(names):
    """Import modules by name, or as the path of a .py file: {name of the module: SHA-256 of its file}.

    Raises UserError, which names --import, for one that is not there, raises anything, or is no file of Python.
    """
    return {_name(name): _import(name) for name in names}


def _name(name):
    return Path(name).stem if name.endswith(".py") else name


def _import(name):
    try:
        module = _from_file(Path(name)) if name.endswith(".py") else importlib.import_module(name)
        return hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()
    except (KeyboardInterrupt, UserError):
        raise
    except BaseException as error:                       # (also SystemExit)
        why = one_line(error, 300) or "no reason given"
        raise UserError(f"--import {name}: cannot be imported ({type(error).__name__}: {why})") from None


def _from_file(path):
    path, name = path.resolve(), f"sidfast_import_{path.stem}"
    known = sys.modules.get(name)
    if known is not None and known.__file__ == str(path):
        return known
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module                           # (dataclasses look there)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
