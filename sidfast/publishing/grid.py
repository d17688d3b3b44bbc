"""Grids of images, labelled, for people to look at; saved with what is in them, so that the images can be taken out."""

import json

from PIL import Image, ImageDraw, PngImagePlugin

from sidfast.publishing.labels import LINE, Label

_TILE = 128                                              # pixels, at least
_GAP, _LABEL = 6, 120
_MOST = 6                                                # lines of a caption
_LAYOUT = "sidfast-grid"                                 # the text chunk of a PNG


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


def save_grid(picture, path):
    """Write an `image_grid` as PNG, with what is in it as a text chunk."""
    text = PngImagePlugin.PngInfo()
    text.add_text(_LAYOUT, picture.info[_LAYOUT])
    picture.save(path, format="PNG", pnginfo=text)


def read_grid(path):
    """(prompts, {label: list of PIL images as they were made}) out of a file of `save_grid`; None if it is none."""
    try:
        with Image.open(path) as picture:
            layout = json.loads(picture.text[_LAYOUT])
            picture = picture.convert("RGB")
        (width, height), columns = layout["tile"], range(len(layout["prompts"]))
    except (OSError, SyntaxError, AttributeError, KeyError, ValueError, TypeError):
        return None
    corners = [[(_LABEL + k * (width + _GAP), layout["top"] + i * (height + _GAP)) for k in columns]
               for i in range(len(layout["rows"]))]
    whole = width % layout["image"][0] == 0              # enlarged by a whole factor: every pixel comes back
    filter_ = Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS
    tiles = [[picture.crop((x, y, x + width, y + height)).resize(layout["image"], filter_)
              for x, y in row] for row in corners]
    return layout["prompts"], dict(zip(layout["rows"], tiles, strict=True))
