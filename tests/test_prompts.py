"""Sources of prompts: files as people write them, endless random access, and mistakes in one line."""

import numpy as np
import pytest

from sidfast.common.errors import UserError
from sidfast.data import shapes
from sidfast.data.lines import find_lines
from sidfast.data.prompts import PromptFile, ShapesPrompts, open_prompts, read_prompts

BOM = b"\xef\xbb\xbf"


def written(tmp_path, data):
    path = tmp_path / "captions.txt"
    path.write_bytes(data)
    return path


def epoch(source, n=0):
    """The prompts of one epoch, in their order."""
    return [source[n * len(source) + i] for i in range(len(source))]


def message(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    text = str(caught.value)
    assert len(text.splitlines()) == 1, text
    return text


FILES = {
    "plain": (b"one\ntwo\nthree\n", ["one", "two", "three"]),
    "no newline at the end": (b"one\ntwo", ["one", "two"]),
    "one line": (b"one", ["one"]),
    "byte order mark": (BOM + b"one\ntwo\n", ["one", "two"]),
    "CRLF": (b"one\r\ntwo\r\nthree", ["one", "two", "three"]),
    "byte order mark and CRLF": (BOM + b"one\r\ntwo\r\n", ["one", "two"]),
    "blank lines": (b"\n\none\n\n \t \n\r\ntwo\n  \nthree\n\n\n", ["one", "two", "three"]),
    "blanks at the end, no newline": (b"one\n  \t", ["one"]),
    "blank first line after a byte order mark": (BOM + b"\r\none\n", ["one"]),
    "spaces around": (b"  one \n\ttwo  words\t\n", ["one", "two  words"]),
    "blank lines in other scripts": ("\u3000\none\n\u00a0 \n\u2003\n\x1f\ntwo\n".encode(), ["one", "two"]),
    "repeated": (b"one\none\ntwo\none\n", ["one", "one", "two", "one"]),
    "other scripts": ("caf\u00e9\n\u732b\u306e\u7d75\n\U0001d11e clef\n".encode(),
                      ["caf\u00e9", "\u732b\u306e\u7d75", "\U0001d11e clef"]),
    "quotes and commas": (b'"a, b"; c\n#no comment\n', ['"a, b"; c', "#no comment"]),
    "old Mac line ends": (b"one\rtwo\r\rthree\r", ["one", "two", "three"]),
    "a carriage return in a line": (b"one \r on two\nthree", ["one", "on two", "three"]),
    "byte order marks of files put together": (BOM + b"one\n" + BOM + b" two\n" + BOM + b"\n", ["one", "two"]),
    "invisible lines": ("\u200b\none\n\u2060\u200d \n\u3164\n\ufe0f\n\x07\n\u2800\ntwo".encode(), ["one", "two"]),
    "line ends of others are white space": ("a\u2028b\x0bc\x0cd\x85e\u2029\n\x0c\n".encode(),
                                            ["a\u2028b\x0bc\x0cd\x85e"]),
    "braces": (b"{a cat|a dog} on a mat\n{}}\n", ["{a cat|a dog} on a mat", "{}}"]),
    "the end of an old file": (b"one\r\ntwo\r\n\x1a", ["one", "two"]),
    "joined emoji": ("\U0001f469\u200d\U0001f680 in space\n".encode(), ["\U0001f469\u200d\U0001f680 in space"]),
}


@pytest.mark.parametrize("data, prompts", FILES.values(), ids=FILES)
def test_file(tmp_path, data, prompts):
    source = PromptFile(written(tmp_path, data))
    order = np.random.default_rng([0, 0]).permutation(len(prompts))
    assert len(source) == len(prompts) and epoch(source) == [prompts[i] for i in order]
    assert read_prompts(tmp_path / "captions.txt") == prompts                            # evaluation has the same


def test_every_epoch_is_a_permutation(tmp_path):
    lines = [f"prompt {i}" for i in range(57)]
    source = PromptFile(written(tmp_path, "\n".join(lines).encode()))
    epochs = [epoch(source, n) for n in range(4)]
    assert all(sorted(e) == sorted(lines) for e in epochs)
    assert len({tuple(e) for e in [lines, *epochs]}) == 5                                # each in an order of its own


def test_random_access(tmp_path):
    """Prompt n depends on n, the seed and the file alone, in whatever order prompts are asked for."""
    path = written(tmp_path, b"".join(b"%d\n" % i for i in range(11)))
    forward = [PromptFile(path, seed=3)[n] for n in range(60)]
    source = PromptFile(path, seed=3)
    assert [source[n] for n in reversed(range(60))] == forward[::-1]
    order = np.random.default_rng(0).permutation(60)
    assert [source[int(n)] for n in order] == [forward[n] for n in order]
    assert source[10**15] == PromptFile(path, seed=3)[10**15]


def test_two_sources_do_not_mix(tmp_path):
    """Caches are shared by class: sources with other seeds and files keep apart."""
    path = written(tmp_path, b"".join(b"%d\n" % i for i in range(40)))
    sources = [PromptFile(path, seed) for seed in range(3)]
    separate = [epoch(source) for source in sources]
    mixed = [[source[n] for source in sources] for n in range(40)]
    assert [list(column) for column in zip(*mixed, strict=True)] == separate


def test_seeds_differ(tmp_path):
    path = written(tmp_path, b"".join(b"%d\n" % i for i in range(40)))
    assert len({tuple(epoch(PromptFile(path, seed))) for seed in range(5)}) == 5
    assert epoch(PromptFile(path, 2)) == epoch(PromptFile(path, 2))


@pytest.mark.parametrize("data, reason", [
    (b"", "is empty"), (b"\n", "empty lines only"), (b" \n\t\r\n\r\n  ", "empty lines only"), (BOM, "empty lines only"),
    (BOM + b"\r\n\n", "empty lines only")],
    ids=("nothing", "newline", "blanks", "byte order mark", "byte order mark and blanks"))
def test_file_without_a_prompt(tmp_path, data, reason):
    path = written(tmp_path, data)
    text = message(PromptFile, path)
    assert text.startswith(f"data.prompts: {path} ") and reason in text


@pytest.mark.parametrize("name", ("none.txt", "."), ids=("missing", "folder"))
def test_no_file(tmp_path, name):
    path = tmp_path / name
    assert message(open_prompts, str(path)) == f"data.prompts: {path} is no file"


NOT_UTF8 = {
    "first byte": (b"\xff\nb\n", 1),
    "first line, later": (b"caf\xe9\nb\n", 1),
    "third line": (b"a\r\nb\r\ncaf\xe9 noir\r\nd\n", 3),
    "after blank lines": (b"\n\n\n\n\xe9\n", 5),
    "last line, no newline": (b"a\nb\nc\xe9", 3),
    "cut off at the end": (b"a\nb\n\xe7\x8c", 3),
    "cut off at the end of a line": (b"a\n\xe7\x8c\nc\n", 2),
    "after other scripts": ("\u732b\n\u732b\n".encode() + b"\x80\n", 3),
    "UTF-16": ("a\nb\n".encode("utf-16"), 1),
}


@pytest.mark.parametrize("data, line", NOT_UTF8.values(), ids=NOT_UTF8)
def test_not_utf8(tmp_path, data, line):
    path = written(tmp_path, data)
    assert message(PromptFile, path) == f"data.prompts: {path}, line {line}: not UTF-8"


def in_chunks(data, size):
    return [data[i:i + size] for i in range(0, len(data), size)]


@pytest.mark.parametrize("size", (1, 2, 3, 4, 5, 7, 64), ids="chunk={}".format)
@pytest.mark.parametrize("name", NOT_UTF8)
def test_not_utf8_across_chunks(name, size):
    data, line = NOT_UTF8[name]
    assert message(find_lines, in_chunks(data, size), "captions.txt") == f"captions.txt, line {line}: not UTF-8"


@pytest.mark.parametrize("size", (1, 2, 3, 4, 5, 7, 64), ids="chunk={}".format)
@pytest.mark.parametrize("name", FILES)
def test_lines_across_chunks(name, size):
    """Characters of 1 to 4 bytes and line ends of two, split by every border."""
    data, prompts = FILES[name]
    found = [data[start:stop].decode().strip("\ufeff\u200b \t\x85\u2029") for start, stop in find_lines(
        in_chunks(data, size), "captions.txt")]
    assert found == prompts


@pytest.mark.parametrize("data, line", [
    (b"x" * 100_001, 1), (b"a\r\n\r\nb\rc\n" + b"x" * 200_000 + b"\nd\n", 5), (b" " * 3 * 10**6, 1),
    (b"a\n" + b"\xff" * 150_000, 2)], ids=["only", "fifth", "blanks", "not UTF-8"])
@pytest.mark.parametrize("size", (7000, 2**24))
def test_a_line_that_is_too_long(data, line, size):
    text = message(find_lines, in_chunks(data, size), "captions.txt")
    assert text in (f"captions.txt, line {line}: is longer than 100,000 bytes; give one prompt a line",
                    f"captions.txt, line {line}: not UTF-8")
    assert len(find_lines([b"x" * 100_000], "captions.txt")) == 1


def test_a_long_line_is_given_up_early():
    """What comes after the limit is not read, let alone kept."""
    def chunks():
        for _ in range(20):
            read.append(len(read))
            yield b"x" * 50_000

    read = []
    assert "line 1: is longer" in message(find_lines, chunks(), "captions.txt") and len(read) == 3


@pytest.mark.parametrize("coding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_null_characters(tmp_path, coding):
    """UTF-16 without a mark is UTF-8, full of null characters."""
    path = written(tmp_path, "one\ntwo\n".encode(coding))
    assert message(PromptFile, path).startswith(f"data.prompts: {path}, line 1: has a null character")


# The shapes world's captions


@pytest.mark.parametrize("split", shapes.SPLITS)
def test_shapes_prompts(split):
    source = open_prompts(f"shapes:{split}", seed=5)
    n = [0, 1, 1023, 1024, 5000, 0]                      # over the borders of blocks
    captions = [source[i] for i in n]
    assert captions == [ShapesPrompts(split, 5)[i] for i in reversed(n)][::-1]
    scenes = shapes.parse_captions([source[i] for i in range(1000, 1100)])
    if split != "all":
        assert (shapes.is_held_out(scenes) == (split == "held_out")).all()


def test_shapes_prompts_do_not_repeat():
    source = ShapesPrompts("train", 0)
    assert len({source[n] for n in range(2048)}) > 1400  # (a quarter are single objects, of which there are 224)
    assert [source[n] for n in range(1024)] != [source[n] for n in range(1024, 2048)]


def test_shapes_seeds_differ():
    runs = [[ShapesPrompts("train", seed)[n] for n in range(20)] for seed in range(4)]
    assert len({tuple(r) for r in runs}) == 4


def test_unknown_split():
    text = message(open_prompts, "shapes:test")
    assert text == "data.prompts: shapes:test is not one of shapes:train, shapes:held_out, shapes:all"
