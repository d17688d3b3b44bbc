"""Grids of images, labelled, for people to look at."""

import textwrap

from PIL import Image, ImageDraw, ImageFont

_TILE = 128                                              # pixels, at least
_GAP, _LABEL = 6, 120


def image_grid(rows, captions=()):
    """One picture out of {label: list of PIL images of equal size}; `captions` stand above the columns."""
    first = next(iter(rows.values()))
    width = max(first[0].width, _TILE)
    scale = width / first[0].width
    height = round(first[0].height * scale)
    font = ImageFont.load_default(12)
    lines = [textwrap.wrap(c, width // 6)[:6] for c in captions]
    head = 16 * max((len(x) for x in lines), default=0) + _GAP if lines else 0
    picture = Image.new("RGB", (_LABEL + len(first) * (width + _GAP), head + len(rows) * (height + _GAP)), "white")
    pen = ImageDraw.Draw(picture)
    for column, text in enumerate(lines):
        pen.multiline_text((_LABEL + column * (width + _GAP), 2), "\n".join(text), "black", font)
    for i, (label, images) in enumerate(rows.items()):
        y = head + i * (height + _GAP)
        pen.multiline_text((4, y + 4), "\n".join(textwrap.wrap(label, _LABEL // 7)), "black", font)
        for column, image in enumerate(images):
            filter_ = Image.Resampling.NEAREST if scale == int(scale) else Image.Resampling.LANCZOS
            picture.paste(image.resize((width, height), filter_), (_LABEL + column * (width + _GAP), y))
    return picture
