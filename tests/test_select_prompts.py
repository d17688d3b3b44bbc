"""`sidfast prompts`: from captions in files, and in a dataset of a hub that this file serves, to a file of prompts."""

import gzip
import http.server
import json
import resource
import sys
import threading
import tracemalloc
import urllib.parse

import pytest
from helpers_input import fails

from sidfast import cli
from sidfast.common.errors import UserError
from sidfast.data.prompts import read_prompts
from sidfast.data.selection import select_prompts
from sidfast.teachers.load import load_prompt_limit

CAPTIONS = ["a red circle", " A  Red\u2003CIRCLE ", "a blue square\r\non white", "", "one", "猫の絵 of a cat",
            "a red circle.", "e\u2028f g", "x " * 300, "a red circle"]
KEPT = ["a red circle", "a blue square on white", "猫の絵 of a cat", "a red circle.", "e\u2028f g"]
REPORT = ["5 prompts of 10 captions", "  dropped: 1 without text", "  dropped: 1 fewer than 3 words",
          "  dropped: 1 more than 22 characters", "  dropped: 2 repeated"]


def as_parquet(rows):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({name: [row[name] for row in rows] for name in rows[0]}), sink)
    return sink.getvalue().to_pybytes()


def rows(name="caption"):
    return [{"id": i, name: text or None} for i, text in enumerate(CAPTIONS)]


def as_csv():
    return "id,caption\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(CAPTIONS))


FILES = {"p.txt": lambda: "\n".join(text.replace("\r\n", " ") for text in CAPTIONS), "t.csv": as_csv,
         "t.jsonl": lambda: "\n".join(map(json.dumps, rows())), "t.json": lambda: json.dumps(rows()),
         "t.parquet": lambda: as_parquet(rows())}


def written(folder, name, data):
    data = data.encode() if isinstance(data, str) else data
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return folder / name


def prompts(*arguments):
    return cli.main(["prompts", *map(str, arguments)])


@pytest.mark.parametrize("zipped", ["", ".gz"])
@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path, capsys, name, zipped):
    source, out = written(tmp_path, name + zipped, FILES[name]()), tmp_path / "out.txt"
    assert prompts(source, "--out", out, "--min-words", 3, "--max-characters", 22) == 0
    assert out.read_text().split("\n") == [*KEPT, ""] and read_prompts(out) == KEPT
    said = capsys.readouterr()
    assert said.out.splitlines() == [f"{out}: {REPORT[0]}", *REPORT[1:]]
    column = f"sidfast: {source}: the prompts are the column 'caption' (of 'id', 'caption')\n"
    assert said.err == ("" if name == "p.txt" else column)
    assert {path.name for path in tmp_path.iterdir()} == {source.name, "out.txt"}


def test_several_sources_and_a_column(tmp_path, capsys):
    one = written(tmp_path, "one.jsonl", '{"a": "first", "b": "second"}\n')
    two = written(tmp_path, "two.csv", "b,c\nSecond,x\nthird,y\n")
    assert prompts(one, two, "--column", "b", "--out", tmp_path / "out.txt") == 0
    assert (tmp_path / "out.txt").read_text() == "second\nthird\n"
    assert "2 prompts of 3 captions\n  dropped: 1 repeated" in capsys.readouterr().out


def test_broken_text_is_dropped(tmp_path, capsys):
    """A line or row that no prompt can be made of costs itself alone."""
    text = b"\xef\xbb\xbfone\r\ncaf\xe9\rtwo\n" + b"x" * 250_000 + b"\nthree\0\n\n\xe7\x8c\xab\n" + b"y" * 150_000
    broken = written(tmp_path, "p.txt", text)
    table = written(tmp_path, "t.jsonl", '{"text": "four"}\n{"text": "\\ud83d"}\n{"text": "a\\u0000b"}\n')
    assert prompts(broken, table, "--out", tmp_path / "out.txt") == 0
    assert (tmp_path / "out.txt").read_text() == "one\ntwo\n猫\nfour\n"
    assert "4 prompts of 11 captions\n  dropped: 6 with broken text\n  dropped: 1 without" in capsys.readouterr().out


def test_sample(tmp_path):
    captions, out = [f"caption {i % 900}" for i in range(1000)], tmp_path / "out.txt"

    def draw(**options):
        selected = select_prompts(iter(captions), out, **options)
        lines = out.read_text().splitlines()
        assert selected.written == len(lines) == len(set(lines)) and set(lines) <= set(captions)
        assert lines == sorted(lines, key=captions.index)
        return lines, selected.dropped

    some, dropped = draw(sample=90, seed=1)
    assert len(some) == 90 and dropped == {"repeated": 100, "not drawn": 810}
    assert draw(sample=90, seed=1)[0] == some != draw(sample=90, seed=2)[0]
    assert {i // 300 for i in map(captions.index, some)} == {0, 1, 2}
    assert len(draw(sample=900)[0]) == len(draw(sample=5000)[0]) == len(draw()[0]) == 900


def test_tokens_of_a_teacher(tmp_path, tiny_teacher, capsys):
    """Prompts that its text encoder would cut off."""
    tokenizer, most = load_prompt_limit(tiny_teacher, "")
    captions = [" ".join(["red"] * n) for n in (1, most - 2, most - 1, 60)]
    source = written(tmp_path, "p.txt", "\n".join(captions))
    assert [len(row) for row in tokenizer(captions).input_ids] == [3, most, most + 1, 62]
    assert prompts(source, "--teacher", tiny_teacher, "--out", tmp_path / "out.txt") == 0
    assert read_prompts(tmp_path / "out.txt") == captions[:2]
    assert capsys.readouterr().out.endswith(f"  dropped: 2 more than {most} tokens\n")


def test_many_prompts_need_little_memory(tmp_path):
    count, text = 30_000, "x" * 200
    tracemalloc.start()
    try:
        select_prompts((f"{i} {text}" for i in range(count)), tmp_path / "out.txt", sample=count // 2)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 60 * count                             # bytes: digests and their order; not the prompts


@pytest.mark.parametrize("arguments, words", [
    (["/nowhere.txt"], "/nowhere.txt: there is no such file"), (["DIR"], "is a folder; name its files, such as"),
    (["PROMPTS", "--files", "*"], "--files *: is of a dataset on the hub"),
    (["PROMPTS", "--revision", "x"], "--revision x: is of a dataset"),
    (["PROMPTS", "--column", "x"], "--column x: p.txt is a text file"),
    (["PROMPTS", "--sample", "0"], "--sample must be at least 1"), (["PROMPTS", "--seed", "-1"], "--seed must be"),
    (["PROMPTS", "--min-words", "0"], "--min-words must be at least 1, not 0"),
    (["PROMPTS", "--min-words", "9", "--max-words", "3"], "--min-words (9) must be at most --max-words (3)"),
    (["PROMPTS", "--min-words", "9"], "none of the 2 captions is left (2 fewer than 9 words"),
    (["PROMPTS", "--teacher", "/nowhere"], "--teacher /nowhere: the folder /nowhere does not exist"),
    (["PROMPTS", "--teacher", "DIR"], "model_index.json"),
    (["TABLE"], "which column has the prompts? There are 'a', 'b'; give one as --column"),
    (["JSON"], "its lines are JSON, not prompts; name it .jsonl"), (["EMPTY"], "is empty")],
    ids=lambda value: None if isinstance(value, str) else "-".join(value))
def test_mistakes(tmp_path, capsys, arguments, words):
    """One line, and a file that is there stays as it was."""
    places = {"PROMPTS": written(tmp_path, "p.txt", "one\ntwo\n"), "TABLE": written(tmp_path, "t.csv", "a,b\n1,2\n"),
              "JSON": written(tmp_path, "lines.txt", '{"a": 1}\n'), "EMPTY": written(tmp_path, "e.txt", ""),
              "DIR": tmp_path}
    out, before = written(tmp_path, "out.txt", "mine\n"), {path.name for path in tmp_path.iterdir()}
    assert words in fails(capsys, cli.main, "prompts", *(places.get(a, a) for a in arguments), "--out", out)
    assert out.read_text() == "mine\n" and {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("out, words", [("p.csv", "must end in .txt"), ("none/p.txt", "does not exist")])
def test_a_bad_out_is_said_first(tmp_path, out, words):
    def captions():
        raise AssertionError
        yield

    with pytest.raises(UserError, match=words):
        select_prompts(captions(), tmp_path / out)


def test_a_full_disk(tmp_path, capsys):
    """Here: a limit to the size of files."""
    source = written(tmp_path, "p.txt", "".join(f"{i} {'x' * 90}\n" for i in range(400)))
    out, limits = written(tmp_path, "out.txt", "mine\n"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        line = fails(capsys, cli.main, "prompts", source, "--out", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"--out {out}: cannot be written (File too large)" in line
    assert out.read_text() == "mine\n" and len(list(tmp_path.iterdir())) == 2


# ---- a hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(dict):
    """{(repository, revision): {name: bytes}}; `asked`: names of files that were asked for."""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that the hub's client finds, by requests and answers as the hub's own."""
    from huggingface_hub import constants

    datasets, asked = Hub(), []
    datasets.asked = asked

    class Answer(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            """Nothing."""

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            parts = [urllib.parse.unquote(p) for p in urllib.parse.urlparse(self.path).path.strip("/").split("/")]
            if parts[0] == "api":
                revision = parts[5] if len(parts) > 5 and parts[5] != COMMIT else "main"
                found = datasets.get(("/".join(parts[2:4]), revision))
                tree = [{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in
                        (found or {}).items()]
                info = {"id": "x", "sha": COMMIT, "siblings": [{"rfilename": file["path"], "size": file["size"]}
                                                               for file in tree]}
                body = found and json.dumps(tree if parts[4:5] == ["tree"] else info).encode()
            else:
                every = {name: data for files in datasets.values() for name, data in files.items()}
                start = parts.index("resolve") + 1
                asked.append("/".join(parts[start + 1:]))
                body = every.get(asked[-1]) if parts[start] == COMMIT else None
            self.send_response(200 if body else 404)
            for name, value in (("Content-Length", len(body or b"")), ("X-Repo-Commit", COMMIT),
                                ("ETag", f'"{hash(body)}"'), *([] if body else [("X-Error-Code", "RepoNotFound")])):
                self.send_header(name, str(value))
            self.end_headers()
            if self.command == "GET" and body:
                self.wfile.write(body)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield datasets
    server.shutdown()
    server.server_close()


def test_dataset_in_parquet(hub, tmp_path, capsys):
    data = as_parquet(rows("TEXT"))
    hub["me/captions", "main"] = {"README.md": b"x", "data/train-0.parquet": data, "data/train-1.parquet": as_parquet(
        [{"TEXT": "a third one"}])}
    assert prompts("me/captions", "--out", "out.txt", "--min-words", 3, "--max-characters", 22) == 0
    assert read_prompts("out.txt") == [*KEPT, "a third one"]
    said = capsys.readouterr()
    assert "me/captions: 2 files, 0.0 MiB to download" in said.err and "6 prompts of 11 captions" in said.out
    assert "me/captions/data/train-0.parquet: the prompts are the column 'TEXT'" in said.err
    assert prompts("me/captions", "--files", "*-1.parquet", "--out", "out.txt") == 0
    assert read_prompts("out.txt") == ["a third one"]


def test_dataset_in_other_formats(hub, tmp_path, capsys):
    """The hub's own conversion to Parquet by default, or the files that are named."""
    hub["me/lines", "main"] = {"a.jsonl": b'{"text": "one"}\n', "run.py": b"raise SystemExit"}
    line = fails(capsys, cli.main, "prompts", "me/lines", "--out", "out.txt")
    assert "no file of this dataset is in Parquet; choose others by --files PATTERN (it has a.jsonl, run.py)" in line
    assert "is named like" not in line and not (tmp_path / "out.txt").exists()
    assert prompts("me/lines", "--files", "*", "--out", "out.txt") == 0
    assert read_prompts("out.txt") == ["one"]
    hub["me/lines", "refs/convert/parquet"] = {"default/train/0000.parquet": as_parquet([{"text": "two"}])}
    assert prompts("me/lines", "--out", "out.txt") == 0
    assert read_prompts("out.txt") == ["two"]
    hub["me/lines", "old"] = {"b.csv": b"text\nthree\n"}
    assert prompts("me/lines", "--files", "*.csv", "--revision", "old", "--out", "out.txt") == 0
    assert read_prompts("out.txt") == ["three"]


def test_dataset_that_is_not_there(hub, capsys):
    line = fails(capsys, cli.main, "prompts", "me/none", "--out", "out.txt")
    assert line.startswith("sidfast: me/none: there is no such file here, and the hub did not give a dataset of that")
    hub["me/lines", "main"] = {"a.jsonl": b"x"}
    line = fails(capsys, cli.main, "prompts", "me/lines", "--files", "*.csv", "--out", "out.txt")
    assert "no file of this dataset with captions has a name like *.csv (it has a.jsonl)" in line


def test_teacher_of_the_hub(hub, tiny_teacher):
    """Its weights are not downloaded."""
    hub["me/teacher", "main"] = {str(path.relative_to(tiny_teacher)): path.read_bytes()
                                 for path in tiny_teacher.rglob("*") if path.is_file()}
    tokenizer, most = load_prompt_limit("me/teacher", "")
    want = load_prompt_limit(tiny_teacher, "")
    assert most == want[1] and tokenizer("a red café").input_ids == want[0]("a red café").input_ids
    assert "tokenizer/tokenizer.json" in hub.asked and not [name for name in hub.asked if "safetensors" in name]
    with pytest.raises(UserError, match="--teacher me/none: not a folder here, and the hub did not give it"):
        load_prompt_limit("me/none", "--teacher me/none")


def test_parquet_without_pyarrow(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    line = fails(capsys, cli.main, "prompts", written(tmp_path, "p.parquet", "PAR1"), "--out", tmp_path / "out.txt")
    assert "reading Parquet needs pyarrow" in line and "pip install 'sidfast[parquet]'" in line
