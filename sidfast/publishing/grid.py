"""Grids of images, labelled, for people to look at; saved with what is in them, so that the images can be taken out."""

import json
import warnings
from typing import Annotated

from PIL import Image, ImageDraw, PngImagePlugin
from pydantic import Field, model_validator

from sidfast.common.errors import UserError
from sidfast.common.records import Schema, check, parse
from sidfast.publishing.labels import LINE, Label

_TILE = 128                                              # pixels, at least
_GAP, _LABEL = 6, 120
_MOST = 6                                                # lines of a caption
_LAYOUT = "sidfast-grid"                                 # the text chunk of a PNG
_Size = Annotated[list[Annotated[int, Field(ge=1, le=2**16)]], Field(min_length=2, max_length=2)]


class _Layout(Schema):
    prompts: list[str]
    rows: Annotated[list[str], Field(min_length=1)]
    tile: _Size
    image: _Size                                         # at most as large as its tile
    top: Annotated[int, Field(ge=0, le=2**16)]

    @model_validator(mode="after")
    def _enlarged(self):
        if any(image > tile for image, tile in zip(self.image, self.tile, strict=True)):
            raise ValueError("image: larger than its tile")
        return self


def image_grid(rows, captions=()):
    """One picture out of {label: list of PIL images of equal size}; `captions` stand above the columns."""
    first = next(iter(rows.values()))
    width = max(first[0].width, _TILE)
    scale = width / first[0].width
    height = round(first[0].height * scale)
    labels = [Label(caption, width, _MOST) for caption in captions]
    head = LINE * max(len(label.lines) for label in labels) + _GAP if labels else 0
    picture = Image.new("RGB", (_LABEL + len(first) * (width + _GAP), head + len(rows) * (height + _GAP)), "white")
    pen = ImageDraw.Draw(picture)
    for column, label in enumerate(labels):
        label.draw(pen, _LABEL + column * (width + _GAP), 2)
    for i, (label, images) in enumerate(rows.items()):
        y = head + i * (height + _GAP)
        Label(label, _LABEL - 8, height // LINE).draw(pen, 4, y + 4)
        for column, image in enumerate(images):
            filter_ = Image.Resampling.NEAREST if scale == int(scale) else Image.Resampling.LANCZOS
            picture.paste(image.resize((width, height), filter_), (_LABEL + column * (width + _GAP), y))
    picture.info[_LAYOUT] = json.dumps({"prompts": list(captions), "rows": list(rows), "tile": [width, height],
                                        "image": list(first[0].size), "top": head})
    return picture


def save_grid(picture, file):
    """Write an `image_grid` to a path or binary file as PNG, with what is in it as a text chunk."""
    text = PngImagePlugin.PngInfo()
    text.add_text(_LAYOUT, picture.info[_LAYOUT])
    picture.save(file, format="PNG", pnginfo=text)


def read_grid(path):
    """(prompts, {label: list of PIL images as they were made}) out of a file of `save_grid`; None for another picture.
    Raises UserError for a file that is damaged."""
    layout, picture = _open(path)
    if layout is None:
        return None
    (width, height), columns = layout["tile"], range(len(layout["prompts"]))
    corners = [[(_LABEL + k * (width + _GAP), layout["top"] + i * (height + _GAP)) for k in columns]
               for i in range(len(layout["rows"]))]
    whole = width % layout["image"][0] == 0              # enlarged by a whole factor: every pixel comes back
    filter_ = Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS
    tiles = [[picture.crop((x, y, x + width, y + height)).resize(layout["image"], filter_)
              for x, y in row] for row in corners]
    return layout["prompts"], dict(zip(layout["rows"], tiles, strict=True))


def _open(path):
    """(what the text chunk says, the picture), (None, None) for a picture without it. Pixels are decoded only once
    their number is known to be what the text says."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)      # (twice as many pixels raise)
            with Image.open(path, formats=["PNG"]) as picture:
                if _LAYOUT not in picture.info:
                    return None, None
                layout = check(parse(str(picture.info[_LAYOUT]).encode()), _Layout)
                _check_size(picture, layout)
                return layout, picture.convert("RGB")
    except Exception as error:                           # (Pillow raises many kinds)
        raise UserError(f"{path}: is damaged ({str(error) or type(error).__name__}); remove it") from None


def _check_size(picture, layout):
    (width, height), rows, columns = layout["tile"], len(layout["rows"]), len(layout["prompts"])
    size = _LABEL + columns * (width + _GAP), layout["top"] + rows * (height + _GAP)
    if columns and picture.size != size:
        raise ValueError(f"{picture.size} pixels, where its text says {size}")
