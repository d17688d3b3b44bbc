"""Text in pictures: in a font that has its characters, in lines that fit."""

import bisect
import contextlib
import functools
import unicodedata
from pathlib import Path

from PIL import ImageFont

LINE = 16                                                # pixels from line to line
_SIZE = 11
_ASCII = frozenset(map(chr, range(32, 127)))
_MOST = 4000                                             # characters looked at


class Label:
    """A text in at most `most` lines of `width` pixels. What no installed font has is spelled out."""

    def __init__(self, text, width, most):
        text = " ".join(text[:_MOST].split())
        self.font, missing = _choose_font(frozenset(text))
        self.lines = _wrap("".join(_spelled(c) if c in missing else c for c in text), self.font, width, most)

    def draw(self, pen, x, y):
        """Draw it with a Pillow ImageDraw, its upper left corner at (x, y)."""
        for k, line in enumerate(self.lines):
            pen.text((x, y + k * LINE), line, "black", self.font)


def _wrap(text, font, width, most):
    """Lines broken between words, or within a word that is too long by itself."""
    lines = []
    while text and len(lines) < most:
        fits = max(1, bisect.bisect_right(range(1, min(len(text), width) + 1), width,
                                          key=lambda n: font.getlength(text[:n])))
        space = text.rfind(" ", 0, fits + 1) if fits < len(text) else -1
        end = space if space > 0 else fits
        lines.append(text[:end].rstrip())
        text = text[end:].lstrip()
    return [*lines[:-1], lines[-1][:-3] + "..."] if text and lines else lines


def _spelled(character):
    """A character that cannot be drawn: emoji by their names, others by their numbers; none for what is invisible."""
    category = unicodedata.category(character)
    if category in ("Cf", "Mn", "Me"):
        return ""
    name = unicodedata.name(character, "") if category == "So" else ""
    return f"[{name.lower()}]" if name else character.encode("unicode_escape").decode()


def _choose_font(characters):
    """(DejaVu Sans, or if it lacks some of the characters the installed font that has the most; those to be spelled
    out.) Without matplotlib, which brings DejaVu and finds fonts: Pillow's own font, for ASCII."""
    try:
        usual = _default_font()
    except ModuleNotFoundError:
        return ImageFont.load_default(_SIZE), {c for c in characters if not c.isascii()}
    missing = characters - _characters(usual)
    seen = {c for c in characters if unicodedata.category(c) not in ("Cc", "Cf", "Mn")}
    for path in _ranked(seen, seen - missing) if missing & seen else ():
        with contextlib.suppress(OSError):               # (a font of pictures, in sizes of its own)
            return ImageFont.truetype(path, _SIZE), characters - _characters(path)
    return ImageFont.truetype(usual, _SIZE), missing


def _ranked(seen, known):
    """The installed fonts that have more of the characters than are `known` already, the most first. Those that lack
    some must have ASCII, in which these are spelled out."""
    shares = {path: len(seen & _characters(path)) for path in _installed_fonts()
              if _characters(path) >= _ASCII or seen <= _characters(path)}
    return sorted((path for path in shares if shares[path] > len(known)), key=lambda path: -shares[path])


def _default_font():
    import matplotlib

    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))


@functools.cache
def _installed_fonts():
    from matplotlib import font_manager

    upright = [f for f in font_manager.fontManager.ttflist if f.style == "normal" and f.weight in (400, "normal")]
    return sorted({font.fname for font in upright if "lastresort" not in font.fname.lower()})      # (boxes, for all)


@functools.cache
def _characters(path):
    """The characters that a font has; none of one that cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(map(chr, FT2Font(path).get_charmap()))
    except (OSError, RuntimeError):
        return frozenset()
