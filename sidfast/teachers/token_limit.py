"""How many tokens the text encoder of a teacher takes, known without its weights."""

from pathlib import Path

from sidfast.common.errors import UserError
from sidfast.teachers.folders import check_hub_id, first_reason
from sidfast.teachers.load import load_tokenizer

_FILES = ("tokenizer/*.json", "tokenizer/*.txt", "text_encoder/config.json")


def load_token_limit(name, what):
    """(The tokenizer of a teacher given as a folder or a hub id, the most tokens of a prompt, start and end included).
    Of the hub no weights are downloaded. Raises UserError, which `what` opens."""
    from transformers import CLIPTextConfig

    folder = Path(name)
    if not folder.is_dir():
        check_hub_id(name, what)
        folder = _download(name, what)
    if not (folder / "text_encoder" / "config.json").is_file():
        raise UserError(f"{what}: {folder} is not a teacher (text_encoder/config.json is missing)")
    try:
        config = CLIPTextConfig.from_pretrained(folder / "text_encoder")
    except Exception as error:                           # the library raises many kinds for a broken file
        raise UserError(f"{what}: {folder}/text_encoder cannot be read ({first_reason(error)})") from None
    tokenizer = load_tokenizer(folder, config, what)
    return tokenizer, tokenizer.model_max_length


def _download(name, what):
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(_FILES)))
    except Exception as error:                           # the hub library raises its own, the network's and the OS's
        raise UserError(f"{what}: {name} is not a folder here, and the hub did not give it "
                        f"({first_reason(error)})") from None
