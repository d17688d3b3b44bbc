"""Labels of sample grids: any text, readable or spelled out, within its place."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sidfast.publishing import labels
from sidfast.publishing.grid import image_grid, read_grid, save_grid

TEXTS = ["a small red circle", "猫の絵 on a mat", "\U0001f984 and \U0001f469\u200d\U0001f680", "قطة على السجادة",
         "Кошка", "line\nbreak\ttab \x07\x1b[0m\0", "x" * 10_000, "word " * 3000, "", " ", "\ud800",
         "e" + "\u0301" * 500, "$x^2$ %s {0}", "\u202eright to left\u202c"]


@pytest.fixture
def no_other_fonts(monkeypatch):
    monkeypatch.setattr(labels, "_installed_fonts", tuple)


@pytest.mark.parametrize("width, most", [(128, 6), (112, 8), (512, 6), (20, 1)])
@pytest.mark.parametrize("text", TEXTS, ids=lambda t: ascii(t)[:20])
def test_any_text_stays_in_its_place(no_other_fonts, text, width, most):
    label = labels.Label(text, width, most)
    assert len(label.lines) <= most
    assert all(label.font.getlength(line) <= width + 1 or len(line) == 1 for line in label.lines)
    assert set("".join(label.lines)) <= labels._characters(labels._default_font())       # no boxes
    picture = Image.new("L", (width + 40, most * labels.LINE + 40), 255)
    label.draw(ImageDraw.Draw(picture), 0, 0)
    assert (np.asarray(picture) < 128).any() == bool("".join(label.lines).strip())


@pytest.mark.parametrize("text, lines", [
    ("one two three", ["one two three"]), ("猫 a", ["\\u732b a"]), ("\U0001f984!", ["[unicorn face]!"]),
    ("a\r\n\tb", ["a b"]), ("bell\x07", ["bell\\x07"]), ("ﬁ ä Ж ع", ["ﬁ ä Ж ع"])], ids=ascii)
def test_what_is_written(no_other_fonts, text, lines):
    assert labels.Label(text, 200, 3).lines == lines


def test_lines_break_between_words(no_other_fonts):
    text = "a small red circle above a large blue square on a white background"
    lines = labels.Label(text, 128, 6).lines
    assert " ".join(lines) == text and len(lines) > 2
    cut = labels.Label(text, 128, 2).lines
    assert len(cut) == 2 and cut[0] == lines[0] and cut[1].endswith("...")
    long = labels.Label("x" * 60, 128, 6).lines
    assert "".join(long) == "x" * 60


def test_a_font_that_has_the_characters_is_taken(monkeypatch):
    """By a font of two characters that is really another one of matplotlib's."""
    other = labels._default_font().replace("DejaVuSans.ttf", "DejaVuSansMono.ttf")
    monkeypatch.setattr(labels, "_installed_fonts", lambda: ["/nowhere.ttf", other])
    known = labels._characters
    monkeypatch.setattr(labels, "_characters", lambda path: frozenset("猫 a") if path == other else known(path))
    assert labels.Label("猫 a", 100, 1).font.path == other and labels.Label("猫 a", 100, 1).lines == ["猫 a"]
    assert labels.Label("猫 b", 100, 1).lines == ["\\u732b b"] and labels.Label("a", 100, 1).font.path != other


def test_a_font_that_has_the_most_is_taken(monkeypatch):
    """With ASCII, in which the rest is spelled out: never boxes."""
    mono, serif = (labels._default_font().replace("DejaVuSans.ttf", name) for name in (
        "DejaVuSansMono.ttf", "DejaVuSerif.ttf"))
    fonts, known = {mono: frozenset("猫犬\U0001f984"), serif: labels._ASCII | set("猫犬")}, labels._characters
    monkeypatch.setattr(labels, "_installed_fonts", lambda: list(fonts))
    monkeypatch.setattr(labels, "_characters", lambda path: fonts.get(path) or known(path))
    for text, font, lines in (
            ("猫 犬 \U0001f984 ab", serif, ["猫 犬 [unicorn face] ab"]), ("猫犬\U0001f984", mono, ["猫犬\U0001f984"]),
            ("猫犬\U0001f984b", serif, ["猫犬[unicorn face]b"]),
            ("猫 鳥", serif, ["猫 \\u9ce5"]), ("鳥", labels._default_font(), ["\\u9ce5"])):
        label = labels.Label(text, 300, 1)
        assert (label.font.path, label.lines) == (font, lines)


def test_last_resort_is_not_a_font():
    """matplotlib brings a font that has a box for every character."""
    assert not any("LastResort" in path for path in labels._installed_fonts())


def test_grids_of_any_text_give_it_back(no_other_fonts, tmp_path):
    texts = [text for text in TEXTS if text != "\ud800"]
    images = [Image.new("RGB", (16, 16), (i, 2 * i, 3 * i)) for i in range(len(texts))]
    save_grid(image_grid({"seed 0": images, "猫 \U0001f984\n" * 50: images}, texts), tmp_path / "g.png")
    prompts, rows = read_grid(tmp_path / "g.png")
    assert prompts == texts and [image.getpixel((3, 3)) for image in rows["seed 0"]] == [
        (i, 2 * i, 3 * i) for i in range(len(texts))]
