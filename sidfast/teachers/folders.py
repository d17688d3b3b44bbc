"""Where a teacher is: a folder, or a model of the hub, of which the files that are needed are downloaded."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from sidfast.common.errors import UserError, first_reason, tell
from sidfast.teachers.weights import STEMS, find_variants

README = "README.md"                                     # of the hub: states the licence
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILE = re.compile(r"\.(safetensors|ckpt|pt|pth|bin|pkl|onnx|gguf|json|zip|tar)$", re.IGNORECASE)
_USUAL_VARIANT = "fp16"                                  # downloaded where there are no plain weights


def find_teacher(name: str, variant: str | None = None, revision: str | None = None, what: str = "model.teacher",
                 choose: Callable[[Path], Sequence[str]] | None = None) -> Path:
    """The folder of a teacher given as a folder or as a hub id (downloaded unless cached).

    `variant`: of the weights to download; `revision`: branch, tag or commit on the hub; `choose(folder)`: looks at what
    is downloaded besides weights, and returns the parts whose weights are needed (default: all). Raises UserError,
    which `what` opens.
    """
    folder = Path(name)
    if folder.is_dir():
        if revision is not None:
            raise UserError(f"model.revision: {name} is a folder; only a model on the hub has revisions")
        return folder
    check_hub_id(name, what)
    return _from_hub(what, name, variant, revision, choose)


def find_network(name: str, what: str) -> Path:
    """The folder of one network with its tokenizer, such as a CLIP's, given as a folder or as a hub id (downloaded
    unless cached). A path that is not there is returned as it is. Raises UserError, which `what` opens."""
    return _from_hub(what, name, parts="") if is_hub_id(name) else Path(name)


def is_hub_id(name: str) -> bool:
    """Whether a name is one of the hub (owner/name), and no path: neither it nor a folder that it would be in is
    here."""
    try:
        check_hub_id(name, "")
    except UserError:
        return False
    return not Path(name).exists()


def _from_hub(what, name, *args, **options):
    try:
        return download(name, *args, **options)
    except UserError:                                    # of `choose`
        raise
    except Exception as error:                           # the hub library raises its own, the network's and the OS's
        raise UserError(f"{what}: {name} is not a folder here, and the hub did not give it "
                        f"({first_reason(error)})") from None


def check_hub_id(name: str, what: str) -> None:
    """Raise UserError for a name that is not an owner/name of the hub, or that is a path: a path is never looked up."""
    path = Path(name)
    if path.is_file() or _FILE.search(name):
        raise UserError(f"{what}: {_explain_file(name, path)}")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or ("/" in name and path.parent.is_dir()):
        hint = "; ~ is not expanded here, write the whole path" if name.startswith("~") else ""
        raise UserError(f"{what}: the folder {name} does not exist{hint}")
    if not _HUB_ID.fullmatch(name):
        raise UserError(f"{what}: {name} is neither a folder nor a hub id (owner/name)")


def _explain_file(name, path):
    if not path.is_file():
        return f"the file {name} does not exist; the folder of a diffusers pipeline is needed"
    if path.suffix.lower() != ".safetensors":
        return (f"{name} is one file and may be a pickle, which can run code when it is loaded; the folder of a "
                "diffusers pipeline in safetensors is needed")
    return (f"{name} is one file; the folder of a diffusers pipeline is needed. Convert a single-file checkpoint once "
            f"in Python: diffusers.StableDiffusionPipeline.from_single_file({name!r}).save_pretrained(NEW)")


def find_cached(name: str, revision: str | None = None) -> Path:
    """The folder of a hub id in the cache of this machine; nothing is downloaded. Raises what the hub library does."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, revision=revision, local_files_only=True))


def find_readme(name: str, revision: str | None = None) -> Path | None:
    """The README.md of a teacher's folder, or of a hub id in the cache on this machine; None if it is not there."""
    path = Path(name) / README
    if path.is_file():
        return path
    if Path(name).is_dir() or not _HUB_ID.fullmatch(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, README, revision=revision)
    except ValueError:                                   # not an id, for example "../x"
        return None
    return Path(found) if isinstance(found, str) else None


def download(name: str, variant: str | None = None, revision: str | None = None,
             choose: Callable[[Path], Sequence[str]] | None = None, parts: str = "*/") -> Path:
    """The folder of a hub id's files in the cache, as far as a pipeline needs them; no code and no pickle.

    `choose`: as for `find_teacher`; `parts`: pattern of the folders of networks, "" for the model's own. Weights of a
    part come in `variant` where they exist so, or else plain, or else in the usual variant. Raises what the hub library
    does.
    """
    from huggingface_hub import snapshot_download

    known = [f"{parts}*{end}" for end in (".json", ".txt", ".model")]
    folder = Path(snapshot_download(name, revision=revision, allow_patterns=["model_index.json", README, *known],
                                    ignore_patterns=["*.index*.json", *([] if parts else ["*/*"])]))
    chosen = choose(folder) if choose else None
    wanted = {variant, None, _USUAL_VARIANT}
    for kind in dict.fromkeys((variant, None, _USUAL_VARIANT)):
        missing = [path.parent for path in sorted(folder.glob(f"{parts}config.json"))        # (networks have one)
                   if (chosen is None or path.parent.name in chosen) and not find_variants(path.parent) & wanted]
        patterns = [f"{path.name}/{pattern}" if parts else pattern for path in missing for pattern in _patterns(kind)]
        if patterns:
            _tell_size(name, snapshot_download(name, revision=revision, allow_patterns=patterns, dry_run=True))
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    return folder


def _tell_size(name, files):
    """A line before a download; `files`: what the hub library says of each."""
    new = [file.file_size or 0 for file in files if file.will_download]
    if new:
        tell(f"downloading {len(new)} file{'s' if len(new) > 1 else ''} of weights of {name}, {sum(new) / 1e9:.2f} GB")


def _patterns(variant):
    """Patterns of the names of a network's files of weights."""
    dotted = "" if variant is None else f".{variant}"
    return [pattern for stem in STEMS.values() for pattern in (
        f"{stem}{dotted}.safetensors", f"{stem}.safetensors.index{dotted}.json",
        f"{stem}{dotted}-[0-9]*-of-*[0-9].safetensors")]
