"""Prompts in tables, as people have them: which column is read, and what is refused in one line."""

import csv
import gzip
import io
import json
import tracemalloc

import pytest
from helpers_input import fails

from sidfast import cli, train
from sidfast.common.errors import UserError
from sidfast.data.prompts import PromptFile, open_lines, read_prompts

CAPTIONS = ["a red circle, on white", 'a "blue" square', "猫 and a café", "a\u2028b"]
ROWS = [{"id": i, "caption": text, "url": "http://x/y,z"} for i, text in enumerate(CAPTIONS)]


def as_csv(rows, **options):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), **options)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
TABLES = {
    "t.jsonl": LINES, "t.ndjson": LINES.replace("\n", "\r\n\r\n"), "lines.json": LINES,
    "mark.jsonl": "\ufeff" + LINES, "texts.jsonl": "".join(json.dumps(text) + "\n" for text in CAPTIONS),
    "t.json": json.dumps(ROWS, indent=2, ensure_ascii=False), "texts.json": "\ufeff" + json.dumps(CAPTIONS),
    "t.csv": as_csv(ROWS), "semicolons.csv": as_csv(ROWS, delimiter=";").replace("http://x/y,z", "z"),
    "unix.csv": as_csv(ROWS, lineterminator="\n"), "mark.CSV": "\ufeff" + as_csv(ROWS),
    "t.tsv": as_csv(ROWS, delimiter="\t"),
}


def written(folder, name, text):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("zipped", [False, True], ids=["", "gz"])
@pytest.mark.parametrize("name", TABLES)
def test_tables(tmp_path, name, zipped):
    data = TABLES[name].encode()
    path = written(tmp_path, f"{name}.gz" if zipped else name, gzip.compress(data) if zipped else data)
    told = []
    assert read_prompts(path, tell=told.append) == CAPTIONS
    source = PromptFile(path, 3)
    assert sorted(source[n] for n in range(len(source))) == sorted(CAPTIONS) and len(source) == len(CAPTIONS)
    assert told == ([] if "texts" in name else [
        f"--prompts {path}: the prompts are the column 'caption' (of 'id', 'caption', 'url')"])


def test_text_as_gz(tmp_path):
    path = written(tmp_path, "p.txt.gz", gzip.compress(b"\xef\xbb\xbfone\r\n\r\ntwo\rthree"))
    assert read_prompts(path) == ["one", "two", "three"]


@pytest.mark.parametrize("columns, column, words", [
    (["url", "TEXT"], None, "TEXT"), (["Prompt ", "id"], None, "Prompt"), (["a", "b"], "b", "b"),
    (["text", "caption"], "text", "text"),
    (["a", "b"], None, "which column has the prompts? There are 'a', 'b'; give one as data.prompts_column"),
    (["text", "caption"], None, "There are 'text', 'caption'"), (["caption", "caption"], None, "which column"),
    (["a", "a"], "a", "the column 'a' is there twice"),
    (["a", "b"], "c", "the column 'c' is not there; there are 'a', 'b'"),
], ids=str)
def test_which_column(tmp_path, columns, column, words):
    path = written(tmp_path, "t.csv", ",".join(columns) + "\n" + ",".join(f"of {name}" for name in columns) + "\n")
    try:
        assert [f"of {words}"] == [text.strip() for text in open_lines(path, column, "data.prompts")]
    except UserError as error:
        assert str(error).startswith(f"data.prompts: {path}: ") and words in str(error) and " " in words


def test_rows_without_a_caption(tmp_path):
    rows = [*ROWS, {"id": 9, "caption": None}, {"id": 10, "caption": " \u200b"}, {"id": 11}, {"caption": "a\r\n b"}]
    told = []
    path = written(tmp_path, "t.jsonl", "\n".join(map(json.dumps, rows)))
    assert read_prompts(path, tell=told.append) == [*CAPTIONS, "a b"]
    assert told[0].endswith("; rows without a caption, which are left out: 3")
    assert read_prompts(written(tmp_path, "t.csv", 'caption\n"a\nb"\n\nc\n')) == ["a b", "c"]


BAD = {
    "empty.csv": ("caption\n\n", "holds no caption"), "no-header.csv": ("a cat,1\n", "There are 'a cat', '1'"),
    "open.csv": ('id,caption\n1,"a cat\n2,b\n', ", line 3: not a table in this format (unexpected end of data)"),
    "quotes.tsv": ('caption\tid\n"a" cat\t1\n', ", line 2: not a table in this format"),
    "ragged.csv": ("id,caption\n1,a cat, red\n", ", line 2: has 3 fields, the header has 2"),
    "latin.csv": ("caption\ncafé\n".encode("latin-1"), ", line 2: not UTF-8"),
    "excel.tsv": ("id\tcaption\n1\ta\n".encode("utf-16"), ", line 1: not UTF-8"),
    "wide.csv": ("id\tcaption\n1\ta\n".encode("utf-16-le"), ", line 1: has a null character"),
    "long.csv": ("caption\n" + "x" * 120_000 + "\n", ", line 2: is longer than 100,000 bytes"),
    "longer.csv": ("caption\n" + "x" * 140_000 + "\n", "field larger than field limit"),
    "huge.jsonl": ('{"text": "' + "x" * 2**24 + '"}', ", line 1: is longer than 16,777,216 bytes"),
    "cut.jsonl": ('{"text": "a"}\n{"text": "b', ", line 2: not JSON (Unterminated string starting at)"),
    "mixed.jsonl": ('{"text": "a"}\n"b"\n', ", line 2: a JSON object is needed, not 'b'"),
    "list.jsonl": ('["a"]\n', ", line 1: a JSON object is needed"),
    "number.jsonl": ('{"text": 3}\n', ", line 1: the caption is not a text ('3')"),
    "several.jsonl": ('{"captions": ["a", "b"]}\n', "the caption is not a text"),
    "half.jsonl": ('{"text": "\\ud83d"}', ", line 1: the caption has half a character"),
    "null.jsonl": ('{"text": "a\\u0000b"}', "null character"),
    "digits.jsonl": ('{"text": ' + "9" * 5000 + "}", "line 1"),
    "coco.json": ('{"images": [], "annotations": []}', "There are 'images', 'annotations'"),
    "comma.json": ('["a" "b"]', ", item 1: a comma or the end of the list is missing"),
    "cut.json": ('["a", "b"', ", item 2: the list has no end"), "more.json": ('["a"]\n["b"]', "more follows"),
    "last.json": ('["a",]', ", item 2: not JSON (Expecting value)"), "none.json": ("[]", "holds no caption"),
    "deep.json": ("[" * 10**5, "recursion"), "numbers.json": ("[1, 2]", ", item 1: a JSON object is needed, not '1'"),
    "x.xlsx": (b"PK\3\4", ".xlsx is not a kind of file"), "x.npz": (b"PK\3\4", ".npz is not a kind of file"),
    "x.png.gz": (b"\x89PNG", ".png is not a kind of file"), "x.csv.zst": (b"x", ".zst is not a kind of file"),
    "text.csv.gz": ("caption\na\n", "is not a gzip file"),
    "cut.txt.gz": (gzip.compress(bytes(range(250)))[:-9], "gzip"),
    "bytes.txt.gz": (gzip.compress(b"a\n\xff"), ", line 2: not UTF-8"),
    "lines.txt": ('{"file_name": "1.jpg", "text": "a cat"}\n', "its lines are JSON, not prompts; name it .jsonl"),
    "table.txt": ("id,caption\n1,a red circle\n2,blue\n", "its lines are rows of a table, not prompts; name it .csv"),
    "quoted.txt": ('"Text"\t"url"\na cat\tx.png\n', "not prompts; name it .tsv"),
    "lines.txt.gz": (gzip.compress(b'{"a": 1}\n'), "its lines are JSON"),
    "unknown": (b"SQLite format 3\0", ", line 1: has a null character"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tables(tmp_path, name):
    data, words = BAD[name]
    path = written(tmp_path, name, data)
    with pytest.raises(UserError) as caught:
        open_lines(path)
    assert str(caught.value).startswith(f"--prompts {path}") and words in str(caught.value), str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("lines", ["text, logo\nred, blue\n", "a,text\nred\n", "caption\na, b\n", "cat,dog\n1,2\n"])
def test_prompts_with_commas_are_prompts(tmp_path, lines):
    assert read_prompts(written(tmp_path, "p.txt", lines)) == lines.splitlines()


def test_a_column_of_what_has_none(tmp_path, capsys, write_config):
    path = written(tmp_path, "p.txt", "one\n")
    with pytest.raises(UserError, match=r"--prompts-column x: p\.txt is a text file"):
        read_prompts(path, "x")
    with pytest.raises(UserError, match="holds texts without columns; leave --prompts-column out"):
        read_prompts(written(tmp_path, "p.json", '["a"]'), "x")
    config = write_config(**{"data.prompts_column": "x"})
    line = fails(capsys, train.main, "--config", config, "--out", tmp_path / "run")
    assert "data.prompts_column (x) has no meaning for shapes:train" in line
    sample = ["sample", "--model", tmp_path, "--out", tmp_path / "x.png", "--prompts-column", "x"]
    assert "--prompts-column x: is of a table" in fails(capsys, cli.main, *sample, "--prompt", "a")


def test_commands_take_the_column(tmp_path, capsys, write_config, tiny_teacher):
    path = written(tmp_path, "t.csv", "long,short\na red circle,a b\n")
    config = write_config(**{"data.prompts": str(path), "model.teacher": "/nowhere"})
    column = ["--set", "data.prompts_column=shrt"]
    assert "the column 'shrt' is not there" in fails(capsys, train.main, "--config", config, "--out", tmp_path / "run",
                                                     *column)
    sample = ["sample", "--model", str(tiny_teacher), "--steps", "1", "--prompts", str(path)]
    assert cli.main([*sample, "--prompts-column", "short", "--out", str(tmp_path / "x.png")]) == 0
    evaluate = ["evaluate", "--model", tiny_teacher, "--prompts", path, "--metrics", "clip", "--clip", "/nowhere"]
    line = fails(capsys, cli.main, *evaluate, "--out", tmp_path / "r.json")
    assert "There are 'long', 'short'; give one as --prompts-column" in line
    assert "no CLIP" in fails(capsys, cli.main, *evaluate, "--prompts-column", "long", "--out", tmp_path / "r.json")


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path, told = tmp_path / "p.parquet", []
    parquet.write_table(pyarrow.table({"TEXT": [*CAPTIONS, None], "image": [b"x"] * 5}), path)
    assert read_prompts(path, tell=told.append) == CAPTIONS
    assert "column 'TEXT' (of 'TEXT', 'image')" in told[0] and "left out: 1" in told[0]
    with pytest.raises(UserError, match="row 1: the caption is not a text"):
        read_prompts(path, "image")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        read_prompts(path)


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.csv"])
def test_large_tables_stay_small_in_memory(tmp_path, name):
    rows = [{"id": i, "caption": f"number {i} of many captions", "more": "x" * 60} for i in range(10_000)]
    text = {"t.jsonl": lambda: "\n".join(map(json.dumps, rows)), "t.json": lambda: json.dumps(rows),
            "t.csv": lambda: as_csv(rows)}[name]()
    path = written(tmp_path, name, text)
    tracemalloc.start()
    try:
        lines = open_lines(path)
        kept, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(lines) == 10_000 and lines[9_999] == "number 9999 of many captions"
    assert kept < 0.8 * len(text) and most < 4 * len(text)
