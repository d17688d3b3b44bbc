"""Captions from files here, and from datasets of the Hugging Face hub, whose files are downloaded one by one."""

import fnmatch
import re
from pathlib import Path

from sidfast.common.errors import UserError, first_reason, tell
from sidfast.data.prompts import is_readable, read_captions

_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_CONVERTED = "refs/convert/parquet"                      # where the hub keeps datasets in other formats as Parquet
_SHOWN = 10


def captions_of(sources, column=None, pattern=None, revision=None):
    """Every caption of several sources in turn (`read_captions`), without end in memory.

    A source is a file, or owner/name of a dataset on the hub: of that, the files whose names match `pattern` (such as
    "data/train-*.parquet"; default: those in Parquet, the hub's own conversion included), at `revision`. No code of a
    dataset is run. Raises UserError at once for a source that is neither, and later for what cannot be read.
    """
    on_hub = {name: _is_on_hub(name) for name in sources}
    if not any(on_hub.values()) and not (pattern is revision is None):
        option = "--files" if pattern is not None else "--revision"
        raise UserError(f"{option} {pattern or revision}: is of a dataset on the hub, and {sources[0]} is a file here")

    def read():
        for name in sources:
            for path, label in _downloaded(name, pattern, revision) if on_hub[name] else [(name, str(name))]:
                yield from read_captions(path, column, label, tell)

    return read()


def _is_on_hub(name):
    path = Path(name)
    if path.is_file():
        return False
    if path.is_dir():
        raise UserError(f"{name}: is a folder; name its files, such as {name.rstrip('/')}/*.parquet")
    if not _ID.fullmatch(name) or is_readable(name) or path.parent.is_dir():
        raise UserError(f"{name}: there is no such file (a dataset on the hub has a name such as owner/name)")
    return True


def _downloaded(name, pattern, revision):
    """(path, label) of each file of a dataset."""
    from huggingface_hub import hf_hub_download

    commit, files = _find(name, pattern, revision)
    tell(f"{name}: {len(files)} file{'s' * (len(files) > 1)}, {sum(f.size or 0 for f in files) / 2**20:,.1f} MiB to "
         "download, unless they are in the hub's cache")
    for file in files:
        try:
            path = hf_hub_download(name, file.rfilename, repo_type="dataset", revision=commit)
        except Exception as error:                       # the hub library raises its own, the network's and the OS's
            raise _refusal(name, error) from None
        yield path, f"{name}/{file.rfilename}"


def _find(name, pattern, revision):
    """(the commit of a dataset, the files of it that are wanted)."""
    from huggingface_hub import HfApi

    names = []
    for place in [revision] if (pattern, revision) != (None, None) else [None, _CONVERTED]:
        try:
            info = HfApi().dataset_info(name, revision=place, files_metadata=True)
        except Exception as error:                       # as above
            if place == _CONVERTED:                      # (there is none)
                break
            raise _refusal(name, error) from None
        files = [file for file in info.siblings or [] if not file.rfilename.startswith(".")]
        found = [file for file in files if fnmatch.fnmatchcase(file.rfilename, pattern or "*.parquet")
                 and is_readable(file.rfilename)]
        if found:
            return info.sha, found
        names = names or [file.rfilename for file in files]
    what = f"with captions has a name like {pattern}" if pattern else "is in Parquet; choose others by --files PATTERN"
    listed = ", ".join(names[:_SHOWN]) + ", ..." * (len(names) > _SHOWN)
    raise UserError(f"{name}: no file of this dataset {what} (it has {listed or 'none'})")


def _refusal(name, error):
    return UserError(f"{name}: there is no such file here, and the hub did not give a dataset of that name "
                     f"({first_reason(error)})")
