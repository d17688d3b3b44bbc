"""Prompts that are a column of a table: .jsonl, .json, .csv, .tsv, .parquet."""

import csv
import json
import re
from array import array

import numpy as np

from sidfast.common.errors import UserError
from sidfast.common.extras import need
from sidfast.data.lines import LIMIT, Lines, clean

CAPTIONS = ("caption", "captions", "prompt", "prompts", "text", "texts", "description")
_ROW = 2**24                                             # bytes of a line of .jsonl, .csv, .tsv
_SPACE = re.compile(r"[ \t\r\n]*")
_BREAKS = re.compile(r"\s*[\r\n]+\s*")
_PYARROW = 15                                            # older ones unpickle what a file brings (CVE-2023-47248)


class Table:
    """The captions of a table, row by row, from the column that is named or whose name says that they are."""

    def __init__(self, label, column, option):
        """`label` opens the messages; `column`: its name or None; `option`: where the user can name it."""
        self.label, self.column, self.option, self.guessed, self.without = label, column, option, None, 0

    def lines(self, kind, stream):
        """The Lines of an open file of a kind of READERS. They are in memory, as UTF-8. Raises UserError."""
        data, ends = bytearray(), array("q", [0])
        for place, text in self.captions(kind, stream):
            if fault := fault_of(text):
                self.refuse(place, fault)
            if text:
                data += text.encode()
                ends.append(len(data))
            else:
                self.without += 1
        ends = np.frombuffer(ends, np.int64)
        return Lines(np.stack([ends[:-1], ends[1:]], 1), lambda start, stop: bytes(data[start:stop]))

    def captions(self, kind, stream):
        """(place, prompt) of each row, as `prompt_of` has it and unchecked; an empty one where there is none."""
        for place, value in READERS[kind](self, stream):
            if value is not None and not isinstance(value, str):
                self.refuse(place, f"the caption is not a text ({str(value)[:40]!a})")
            yield place, prompt_of(value or "")

    def note(self):
        """What the user should know of how the table was read, or None."""
        notes = [f"the prompts are the column {self.column!r} (of {_listed(self.guessed)})"] if self.guessed else []
        notes += [f"rows without a caption, which are left out: {self.without}"] if self.without else []
        return f"{self.label}: {'; '.join(notes)}" if notes else None

    def choose(self, names):
        """The name of the column of prompts, given those of all columns. Raises UserError."""
        if self.column is None:
            usual = [name for name in names if name.strip().lower() in CAPTIONS]
            if len(usual) != 1:
                raise UserError(f"{self.label}: which column has the prompts? There are {_listed(names)}; give one as "
                                f"{self.option}")
            self.column, self.guessed = usual[0], names
        if names.count(self.column) != 1:
            fault = "there twice" if self.column in names else "not there"
            raise UserError(f"{self.label}: the column {self.column!r} is {fault}; there are {_listed(names)} "
                            f"({self.option})")
        return self.column

    def refuse(self, place, fault):
        """Raise the UserError for a fault at a place in the table."""
        raise UserError(f"{self.label}{place and f', {place}'}: {fault}")


def prompt_of(text):
    """A text as a prompt: in one line, and empty if nothing of it is visible."""
    text = clean(text)
    return _BREAKS.sub(" ", text) if "\n" in text or "\r" in text else text


def fault_of(prompt):
    """What keeps a text from being a prompt, or None."""
    try:
        size = len(prompt.encode())
    except UnicodeEncodeError:
        return f"the caption has half a character ({prompt[:40]!a})"
    if "\0" in prompt:
        return "the caption has a null character"
    return f"is longer than {LIMIT:,} bytes; give one prompt a line" if size > LIMIT else None


def _listed(names):
    return ", ".join(repr(name[:40]) for name in names[:20]) + (", ..." if len(names) > 20 else "")


def _text_lines(table, stream):
    """("line n", text) of every line of a table in text form."""
    for number, data in enumerate(iter(lambda: stream.readline(_ROW + 1), b""), 1):
        if len(data) > _ROW:
            table.refuse(f"line {number}", f"is longer than {_ROW:,} bytes")
        try:
            text = data.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            table.refuse(f"line {number}", "not UTF-8")
        if "\0" in text:
            table.refuse(f"line {number}", "has a null character")
        yield f"line {number}", text


def _captions(table, rows):
    """(place, caption) of rows that are objects or the captions themselves; the first row says which."""
    plain = None
    for place, row in rows:
        if plain is None:
            plain = isinstance(row, str)
            if plain and table.column is not None:
                table.refuse("", f"holds texts without columns; leave {table.option} out")
            if isinstance(row, dict):
                table.choose(list(row))
        if not isinstance(row, str if plain else dict):
            table.refuse(place, f"a {'text' if plain else 'JSON object'} is needed, not {str(row)[:40]!a}")
        yield place, row if plain else row.get(table.column)


def _read_jsonl(table, stream):
    def rows():
        for place, text in _text_lines(table, stream):
            if text.strip():
                yield place, _parse(table, place, text)

    return _captions(table, rows())


def _parse(table, place, text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:        # (ValueError: also a number with too many digits)
        table.refuse(place, f"not JSON ({str(error).partition(':')[0]})")


def _read_json(table, stream):
    """A list, whose items are parsed one by one, for all of them together take several times the file's size; or, under
    this name too, a line for each row."""
    start = stream.read(64)
    stream.seek(0)
    if not start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        return _read_jsonl(table, stream)
    try:
        return _captions(table, _items(table, stream.read().decode("utf-8-sig")))
    except UnicodeDecodeError:
        return table.refuse("", "not UTF-8")


def _items(table, text):
    decoder, position, number = json.JSONDecoder(), _skip(text, text.index("[") + 1), 0
    try:
        while text[position] != "]" or number:
            number += 1
            value, position = decoder.raw_decode(text, position)
            yield f"item {number}", value
            position = _skip(text, position)
            if text[position] == "]":
                break
            if text[position] != ",":
                table.refuse(f"item {number}", "a comma or the end of the list is missing after it")
            position = _skip(text, position + 1)
        if _skip(text, position + 1) != len(text):
            table.refuse("", "more follows after the end of the list")
    except IndexError:
        table.refuse(f"item {number}", "the list has no end")
    except (ValueError, RecursionError) as error:
        table.refuse(f"item {number}", f"not JSON ({str(error).partition(':')[0]})")


def _skip(text, position):
    return _SPACE.match(text, position).end()


def _read_csv(table, stream):
    header = stream.readline(_ROW)
    stream.seek(0)
    return _separated(table, stream, ";" if b";" in header and b"," not in header else ",")


def _read_tsv(table, stream):
    return _separated(table, stream, "\t")


def _separated(table, stream, separator):
    """Rows below a header. Quotes are read strictly, for one that is never closed would take in the rows after it."""
    reader = csv.reader((text for _, text in _text_lines(table, stream)), delimiter=separator, strict=True)
    place = "line 1"
    try:
        header = [name.strip() for name in next(reader, ())]
        column = header.index(table.choose(header))
        for row in reader:
            place = f"line {reader.line_num}"
            if row and len(row) != len(header):
                table.refuse(place, f"has {len(row)} fields, the header has {len(header)}")
            if row:
                yield place, row[column]
    except csv.Error as error:
        table.refuse(f"line {reader.line_num}", f"not a table in this format ({error})")


def _read_parquet(table, stream):
    pyarrow = need("pyarrow", "parquet", f"{table.label}: reading Parquet")
    from pyarrow import parquet

    if int(pyarrow.__version__.partition(".")[0]) < _PYARROW:
        table.refuse("", f"pyarrow {pyarrow.__version__} is too old to read files of others; {_PYARROW} is needed")
    try:
        file, number = parquet.ParquetFile(stream), 0
        for batch in file.iter_batches(8192, columns=[table.choose(file.schema_arrow.names)]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield f"row {number}", value
    except (pyarrow.ArrowException, OSError) as error:
        table.refuse("", f"cannot be read as Parquet ({str(error).partition(chr(10))[0]})")


READERS = {".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_tsv,
           ".parquet": _read_parquet}
