"""A file of prompts that changes under a run: the run ends with a line and a checkpoint, and resumes exactly."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import Forked, fork_training, free_port, losses

from sidfast.checkpoints.store import checkpoint_fault
from sidfast.data.lines import PromptsChanged
from sidfast.data.prompts import PromptFile

TEXT = b"".join(b"prompt %d of the file\n" % i for i in range(49)) + b"a longer prompt" * 40 + b"\n"


def in_place(data, size=None):
    """change(path): other bytes in the same file, which is cut off at `size`."""

    def change(path):
        with open(path, "r+b") as file:
            file.write(data)
            if size is not None:
                file.truncate(size)

    return change


def replaced(data):
    def change(path):
        path.with_name("new").write_bytes(data)
        os.replace(path.with_name("new"), path)

    return change


def aged(path, data=TEXT):
    """A file of prompts, written an hour ago."""
    path.write_bytes(data)
    os.utime(path, (time.time() - 3600,) * 2)
    return path


CHANGES = {"overwritten": in_place(TEXT.replace(b"prompt", b"dragon")), "cut off": in_place(b"", 100),
           "emptied": in_place(b"", 0), "not UTF-8 any more": in_place(b"\xff" * len(TEXT)),
           "longer": in_place(TEXT + b"one more\n"), "replaced": replaced(TEXT.upper())}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_noticed(tmp_path, change):
    path = aged(tmp_path / "p.txt")
    source = PromptFile(path)
    assert sorted(source[n] for n in range(50)) == sorted(TEXT.decode().splitlines())
    change(path)
    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(source.__getitem__, n) for n in range(8)]:
            with pytest.raises(PromptsChanged, match=f"data.prompts: {path} has changed since the run started"):
                future.result()


@pytest.mark.parametrize("change", [
    lambda p: os.utime(p), lambda p: p.chmod(0o600), in_place(TEXT), replaced(TEXT), lambda p: p.unlink()],
    ids=["touched", "mode", "written again", "replaced by an equal one", "deleted"])
def test_the_same_contents_pass(tmp_path, change):
    path = aged(tmp_path / "p.txt")
    source = PromptFile(path)
    before = [source[n] for n in range(50)]
    change(path)
    assert [source[n] for n in range(50)] == before
    if path.exists():
        in_place(b"X")(path)                             # noticed all the same
        os.utime(path)
        with pytest.raises(PromptsChanged):
            source[0]


def wait_for_steps(out, process, count=3):
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").is_file() or len(losses(out)) < count:
        assert process.poll() is None, process.stderr.read()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def ended(processes, out, path):
    """The step of the checkpoint that a run left which ended for its prompts."""
    for process in processes:
        assert process.wait(120) == 1, process.stderr.read()[-2000:]
    said = processes[0].stderr.read().replace("\r", "\n").splitlines()
    lines = [line for line in said if line.startswith("sidfast: ")]
    assert "sidfast: data.prompts: 1 of 50 prompts is longer than the 24 tokens that the text encoder takes; the " \
           "rest of the text is cut off" in lines
    saved = max((out / "checkpoints").glob("step-*"))
    step = int(saved.name[5:])
    assert lines[-1].startswith(f"sidfast: data.prompts: {path} has changed") and (
        f"the run stopped after step {step}." in lines[-1]) and str(saved) in lines[-1], lines
    assert "Traceback" not in "".join(process.stderr.read() for process in processes)
    assert checkpoint_fault(saved) is None and step >= 3
    return step


@pytest.fixture
def config(write_config, tmp_path):
    return write_config(**{"data.prompts": str(aged(tmp_path / "p.txt")), "train.steps": 10**6, "train.batch_size": 2,
                           "train.micro_batch": 1, "train.save_every": 10**6})


@pytest.mark.parametrize("name", ["overwritten", "cut off"])
def test_a_run_ends_with_a_checkpoint(config, tmp_path, name):
    out, path = tmp_path / "run", tmp_path / "p.txt"
    process = fork_training(config, out, free_port())
    wait_for_steps(out, process)
    CHANGES[name](path)
    step = ended([process], out, path)
    process = fork_training(config, out, free_port())    # before it is put back
    assert process.wait(120) == 2 and "data.prompts is not what it was" in process.stderr.read()
    path.write_bytes(TEXT)
    if name == "overwritten":
        runs = [fork_training(config, folder, free_port(), "--set", f"train.steps={step + 3}")
                for folder in (out, tmp_path / "whole")]
        assert [run.wait(120) for run in runs] == [0, 0], runs[0].stderr.read()[-2000:]
        assert len(losses(out)) == step + 3 and losses(out) == losses(tmp_path / "whole")


def test_two_processes_end_and_save_at_one_step(config, tmp_path):
    out, path, port = tmp_path / "run", tmp_path / "p.txt", free_port()
    options = ["--config", config, "--out", out, "--set", "train.save_minutes=1e-6"]
    processes = [Forked("train", options, port, RANK=str(rank), LOCAL_RANK=str(rank),
                        WORLD_SIZE="2", LOCAL_SIZE="2", MASTER_ADDR="127.0.0.1") for rank in range(2)]
    wait_for_steps(out, processes[0])
    CHANGES["replaced"](path)
    step = ended(processes, out, path)
    state = json.loads((out / "checkpoints" / f"step-{step:08d}" / "state.json").read_text())
    assert len(state["extra"]["sums"]) == 2
    assert len(list((out / "checkpoints").glob("step-*"))) == 2  # (of those by the clock, `keep`)
