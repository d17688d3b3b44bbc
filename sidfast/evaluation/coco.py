"""COCO-2014 val as captions and a reference of 256 x 256 images (method.md, section 9), from the official files.

    DIR/annotations/captions_val2014.json     DIR/val2014/*.jpg                 what one downloads
    DIR/sidfast/captions.txt                  DIR/sidfast/reference-256/*.png    what is made of it, once
"""

import hashlib
import json
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from sidfast.common.errors import UserError
from sidfast.common.files import remove, replacing, write_atomically
from sidfast.data.lines import clean
from sidfast.data.prompts import read_prompts

SIDE = 256
IMAGES = 30_000
_ANNOTATIONS = "annotations/captions_val2014.json"
_IMAGES = "val2014"


def prepare_coco(folder):
    """Write captions and crops below `folder` unless they are there. Returns the paths of both.

    Line i of the captions is the first caption of one image; images come in the order of a hash of their id, so the
    first n lines are a random sample that is the same everywhere. Goes on where it was interrupted. Raises UserError
    for a missing or broken file.
    """
    folder = Path(folder)
    captions, crops = folder / "sidfast" / "captions.txt", folder / "sidfast" / f"reference-{SIDE}"
    if not crops.is_dir():
        names, texts = _read_annotations(folder / _ANNOTATIONS)
        missing = [name for name in names.values() if not (folder / _IMAGES / name).is_file()]
        if missing:
            raise UserError(f"--coco {folder}: {len(missing)} images of the annotations are missing, the first is "
                            f"{_IMAGES}/{missing[0]}")
        partial = crops.with_name(f".{crops.name}.partial")
        try:
            if partial.is_symlink():
                remove(partial)
            partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--coco {folder}: {partial.parent} cannot be written ({error.strerror})") from None
        for name in tqdm(names.values(), desc="crops", mininterval=2):
            _write_crop(folder / _IMAGES / name, partial / f"{Path(name).stem}.png")
        ordered = sorted(texts, key=lambda key: hashlib.sha256(str(key).encode()).digest())
        write_atomically(captions, "".join(f"{texts[key]}\n" for key in ordered))
        partial.rename(crops)                            # last: its presence says that all is there
    return captions, crops


def caption_count(captions):
    """How many images the protocol asks for, given the captions there are."""
    return min(IMAGES, len(read_prompts(captions)))


def _read_annotations(path):
    """({image id: file name}, {image id: caption}), of each image the caption with the smallest id."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        names = {int(image["id"]): Path(image["file_name"]).name for image in content["images"]}
        texts = {}
        for entry in sorted(content["annotations"], key=lambda a: a["id"]):
            text = clean(" ".join(entry["caption"].split()))
            if text:
                texts.setdefault(int(entry["image_id"]), text)
    except FileNotFoundError:
        raise UserError(f"--coco: {path} is missing; it is in annotations_trainval2014.zip of COCO") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"--coco: {path} is not COCO's file of captions") from None
    if not texts or not texts.keys() <= names.keys():
        raise UserError(f"--coco: {path} has no caption, or captions of images that it does not list")
    return names, texts


def _write_crop(source, target):
    """The centre of an image, SIDE x SIDE: its shorter side resized with Pillow's antialiased bicubic filter."""
    if target.is_file():
        return
    try:
        with Image.open(source) as file:
            image = file.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"--coco: {source} is no image or a broken one ({str(error).splitlines()[0]})") from None
    scale = SIDE / min(image.size)
    width, height = (max(SIDE, round(length * scale)) for length in image.size)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + SIDE, top + SIDE))
    with replacing(target, durable=False) as file:
        image.save(file, format="PNG")
