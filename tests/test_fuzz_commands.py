"""Whatever is on a command line of `sidfast`, and in the files that it names: it works, or one line and exit 2."""

import json
import random
import shutil
import struct

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from test_fuzz import LONG, QUICK, Tally, garbage, outcome, texts

from sidfast import cli

CLIP = ROOT / "assets" / "clip"
NUMBERS = ["0", "1", "2", "-1", "x", "", "1.5", "nan", "1e9", "٣", "0x10", "--", str(10**30)]
# option -> what may follow it, beside the files of `material`
OPTIONS = {
    "sample": {"--prompt": ["a cat", "", "\ud800", "\udce9", "x" * 3000], "--prompts": ["prompts.txt"] * 3,
               "--seed": [*NUMBERS, str(2**80)],
               "-n": ["0", "1", "-1", "x", str(10**30)], "--steps": ["1", "0", "-3", "x"],
               "--guidance": ["1", "nan", "x", "-1e300"],
               "--model": ["teacher"] * 9 + ["no/such", "", "\0", "x" * 5000],
               "--height": NUMBERS[:6], "--width": ["16", "24", "x"], "--device": ["cpu", "cpu", "cuda:77", ""],
               "--out": ["a.png", "b.png", "c.png", "a.jpg", "a.gif", "d", "", "no/a.png", "\0.png"]},
    "prompts": {"": ["prompts.txt"] * 3 + ["no/such", "\0", "x" * 5000], "--column": ["caption", ""],
                "--min-words": NUMBERS[:6], "--max-characters": NUMBERS[:6], "--sample": NUMBERS[:6],
                "--seed": NUMBERS, "--teacher": ["teacher", "\0"], "--out": ["p.txt", "", "no/p.txt", "\0"]},
    "evaluate": {"--model": ["no/such", "\0", "x" * 5000], "--prompts": ["shapes:held_out", "shapes:train", "\0"],
                 "--reference": ["\0", "x" * 5000], "--images": NUMBERS[:6], "--metrics": ["fid", "kid,clip", "x", "",
                 "diversity", "fid,", "accuracy"], "--features": ["clip:", "inception:x", "x", "inception:\0"],
                 "--seeds-per-prompt": NUMBERS, "--seed-offset": NUMBERS, "--clip": ["\0", ""], "--resize": NUMBERS[:7],
                 "--steps": ["1", "0", "x"], "--batch-size": NUMBERS[:7], "--out": ["r.json", "", "no/r.json", "\0"],
                 "--dtype": ["fp32", "x"]},
    "compare": {"": ["result.json"] * 4 + ["r.json", "\0", "x" * 5000],
                "--out": ["c", "", "no/c", "\0"], "--paper": None},
    "report": {"--run": ["no", "", "\0", "x" * 5000]},
    "plan": {"--config": ["no.json", "\0"], "--set": ["x", "train.steps=no", "model.teacher=/no/x"],
             "--gpus": [*NUMBERS, str(10**30)], "--memory": ["24G", "x", "-1", "1" * 400],
             "--throughput": ["x", "1e400"], "--measured": ["no"], "--bandwidth": NUMBERS, "--architecture": ["x"]},
    "random-teacher": {"--architecture": ["x", ""], "--out": ["t"]},
    "teacher": {"--steps": ["0", "-1", "x"], "--out": ["t"]},
    "": {"": ["", "x", "--help", "sample", "-n"]},
}


@pytest.fixture(scope="module")
def material(tiny_teacher, tmp_path_factory):
    """A folder of things to give to commands, good ones and garbage, and their names."""
    folder = tmp_path_factory.mktemp("material")
    shutil.copytree(tiny_teacher, folder / "teacher")
    shutil.copytree(tiny_teacher, folder / "broken")
    next((folder / "broken" / "unet").glob("*.safetensors")).write_bytes(b"\0" * 99)
    shutil.copytree(CLIP, folder / "clip")
    (folder / "empty").mkdir()
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    rng = random.Random(0)
    for name, content in {
            "noise.bin": rng.randbytes(3000), "nothing": b"", "noise.png": b"\x89PNG\r\n\x1a\n" + rng.randbytes(200),
            "noise.npz": b"PK\x03\x04" + rng.randbytes(200), "header": struct.pack("<Q", 2**60), "list.json": b"[1, 2]",
            "deep.json": b"[" * 100_000, "result.json": b'{"metrics": {"fid": 3.0, "clip_score": 0.3}, "images": 2, '
            b'"model": {}, "prompts": {"sha256": "x"}}', "latin.txt": "caf\xe9\n".encode("latin-1")}.items():
        (folder / name).write_bytes(content)
    for run in ("run", "run2"):
        (folder / run).mkdir()
    (folder / "run" / "config.json").write_bytes(b'{"config": []}')
    (folder / "run2" / "config.json").write_bytes(b'{"config": {"guidance": {}, "model": {}}}')
    (folder / "run2" / "metrics.jsonl").write_bytes(b"[]\n3\n")
    return folder, sorted(p.name for p in folder.iterdir())


@st.composite
def lines(draw, names):
    """The words of a command line, and the content of a JSON file called fuzz.json."""
    command = draw(st.sampled_from(sorted(OPTIONS)))
    words = [command] if command else []
    needed = ["--out", "--model", "--run", "--config", *(["--steps"] * (command == "teacher"))]  # or it trains
    for option, values in OPTIONS[command].items():
        if draw(st.integers(0, 3)) == 0 and option not in needed:
            continue
        if values is None:
            words.append(option)
            continue
        listed = st.sampled_from([*values, *names[:1]])
        other = st.one_of(st.sampled_from(names), texts.filter(lambda t: not t.strip().isdigit()))
        value = draw(listed if draw(st.integers(0, 3)) else other)
        if option == "--out" and (value in names or value.startswith(("/", "~", ".."))):
            value = "out"
        words += [option, value] if option else [value]
    return words, json.dumps(draw(garbage))


def fuzz_commands(capsys, monkeypatch, material, tmp_path, options):
    tally, (folder, names) = Tally(), material
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    @options
    @given(lines([*names, "fuzz.json"]))
    def check(case):
        words, text = case
        place = tmp_path / "place" / "inner"
        shutil.rmtree(place.parent, ignore_errors=True)
        place.mkdir(parents=True)
        for name in names:
            (place / name).symlink_to(folder / name)
        (place / "fuzz.json").write_text(text)
        monkeypatch.chdir(place)
        code = outcome(capsys, cli.main, words, place / "out")
        tally.ran += code == 0
        tally.refused += code == 2

    check()
    return tally


def test_command_lines(capsys, monkeypatch, material, tmp_path):
    assert fuzz_commands(capsys, monkeypatch, material, tmp_path, QUICK).refused > 50


@pytest.mark.slow
def test_a_thousand_command_lines(capsys, monkeypatch, material, tmp_path):
    tally = fuzz_commands(capsys, monkeypatch, material, tmp_path, LONG.__class__(LONG, max_examples=1000))
    with capsys.disabled():
        print(f"\n{tally}")
    assert tally.refused > 500 and tally.ran > 10
