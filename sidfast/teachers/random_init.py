"""Randomly initialised teachers of real architectures: the real path at real size, without any weights to download."""

from pathlib import Path

import torch

from sidfast.common.errors import UserError
from sidfast.common.files import check_folder, replacing_folder
from sidfast.teachers.families import ARCHITECTURES
from sidfast.teachers.tokenizer import build_tokenizer


def write_random_teacher(architecture: str, folder: str | Path, device: torch.device, seed: int = 0) -> None:
    """Write a pipeline of one of ARCHITECTURES with random weights, fp16, about 2 GB, to `folder`.

    All or nothing. Raises UserError for a folder that is not empty, or cannot be made.
    """
    folder = Path(folder)
    check_folder(folder)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"--out {folder}: is there already; choose another folder")
    family, tokenizer = ARCHITECTURES[architecture], build_tokenizer()           # (of the shapes world alone)
    torch.manual_seed(seed)
    with torch.device(device):
        networks = family.build(architecture, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                                pad_token_id=tokenizer.pad_token_id)
    for module in networks.values():
        torch.nn.Module.to(module, "cpu", torch.float16)
    parts = networks | {"scheduler": family.build_scheduler(architecture, {})}
    for part, encoder in family.tokenizers.items():
        parts[part] = build_tokenizer()
        parts[part].model_max_length = networks[encoder].config.max_position_embeddings
    with replacing_folder(folder) as new:
        family.pipeline_of(parts).save_pretrained(new)
