"""Files that come with the package: assets/ (the toy teacher, its CLIP and attribute classifier) and configs/.

A path that begins with assets/ or configs/ means the file in the working directory, or else the package's own.
"""

import os
import re
from pathlib import Path

from sidfast.common.errors import UserError

_PACKAGE = Path(__file__).parents[1]
HOME = _PACKAGE if (_PACKAGE / "assets").is_dir() else _PACKAGE.parent           # installed, or a checkout
_BARE = re.compile(r"[\w-]+(/[\w-]+)*")


def shipped(path):
    """`path` (text), or that of the package's own file if it begins with assets or configs and is not in the working
    directory."""
    own = os.path.join(HOME, path)
    inside = Path(path).parts[:1] in (("assets",), ("configs",)) and ".." not in Path(path).parts
    return own if inside and not os.path.lexists(path) and os.path.exists(own) else path


def find_config(name):
    """The path (text) of a configuration or study given by its path, or by its bare name among the package's own, such
    as ddpm or ablations/guidance. Raises UserError for a bare name that is neither."""
    own = os.path.join(HOME, "configs", f"{name}.json")
    if not _BARE.fullmatch(name) or os.path.lexists(name):
        return shipped(name)
    if not os.path.isfile(own):
        known = ", ".join(sorted(path.stem for path in (HOME / "configs").glob("*.json")))
        raise UserError(f"{name}: no such file, and no configuration that comes with sidfast ({known})")
    return own
