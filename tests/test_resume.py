"""Interrupted runs go on exactly, killed at any moment, with the same command, bit for bit; and what runs leave."""

import json
import os
import random
import re
import shutil
import subprocess
import time
import warnings

import golden
import pytest
import torch
from conftest import ROOT, Forked, fork_training, free_port, losses, start_launcher
from golden import STEPS
from helpers_checkpoint import write_checkpoint

from sidfast.checkpoints.format import read_state, seal
from sidfast.checkpoints.store import checkpoint_fault, choose_checkpoint, find_checkpoint, read_tensors
from sidfast.common.errors import UserError


def finish(process, timeout=200):
    try:
        _, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill(process)                                    # or it would slow down every test after this one
        raise
    assert process.returncode == 0, errors[-3000:]
    return errors


def wait_for(condition, process, timeout=150):
    deadline = time.time() + timeout
    while not condition():
        assert process.poll() is None, "the run ended before it could be killed: " + process.stderr.read()[-2000:]
        assert time.time() < deadline
        time.sleep(0.001)


def kill(process):
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def config(tiny_teacher, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps(golden.golden_config(tiny_teacher)))
    return path


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A run that was never interrupted, under DeepSpeed's launcher; the others are forked. The checkout is on its path,
    and another package `kernels`, as the launcher puts it there on several machines."""
    out, stub = tmp_path_factory.mktemp("whole") / "run", tmp_path_factory.mktemp("stub")
    (stub / "kernels").mkdir()
    (stub / "kernels" / "__init__.py").write_text(
        '__version__ = "0.0.1"\nfrom pathlib import Path\nPath(__file__).with_name("imported").touch()\n')
    told = finish(start_launcher("sidfast/train.py", "--config", config, "--out", out, port=free_port(),
                                 PYTHONPATH=os.pathsep.join([str(ROOT), str(stub), os.environ.get("PYTHONPATH", "")])))
    assert (stub / "kernels" / "imported").exists()      # by transformers, which looks at its version
    assert told.count("sidfast: plain PyTorch takes over: no fused kernels: there is no GPU here; no CUDA") == 1
    return out


@pytest.fixture(scope="module")
def killed(config, tmp_path_factory):
    """The same run, killed four times: at random moments, while a checkpoint is written, and after the last step. Its
    last start is a `sidfast train`."""
    out = tmp_path_factory.mktemp("killed") / "run"
    chance, metrics, checkpoints = random.Random(0), out / "metrics.jsonl", out / "checkpoints"

    def lines():
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    def saving():
        return any(checkpoints.glob(".partial-*/*")) if checkpoints.exists() else False

    for moment in (lambda: lines() >= 2, saving, lambda: (checkpoints / "step-00000016").exists()):
        process = fork_training(config, out, 29722)
        wait_for(moment, process)
        if moment is not saving:
            time.sleep(chance.random() * 0.5)
        kill(process)
    for folder in (out, out / "samples", checkpoints, checkpoints / ".partial-step-00000020"):
        folder.mkdir(exist_ok=True)
        (folder / ".sidfast-0123456789abcdef.partial").touch()               # (a kill seldom hits so small a write)
    finish(Forked("cli", ["train", "--config", config, "--out", out], 29722))
    return out


def test_numbers_are_those_of_before(whole):
    """Losses, checkpoint and export, bit for bit where the processor and the libraries are the same."""
    exact, differences = golden.compare(golden.measure(whole), json.loads(golden.FILE.read_text()))
    assert not differences, "\n".join(differences)
    if not exact:
        warnings.warn(f"another processor or other libraries than in {golden.FILE.name}: compared within tolerances",
                      stacklevel=1)


@pytest.mark.parametrize("exact", [True, False])
def test_other_numbers_are_seen(exact):
    kept, other = (json.loads(golden.FILE.read_text()) for _ in range(2))
    assert golden.compare(other, kept) == (True, [])
    other["losses"]["6"][1] *= 1 + 1e-3
    other["losses"].pop("24")
    other["tensors"]["generator.ema"] = {"sha256": "0", "norm": 2.0}
    other["tensors"].pop("export/unet")
    if not exact:
        other["origin"]["torch"] = "1.0"
    same, differences = golden.compare(other, kept)
    assert same is exact and len(differences) == (7 if exact else 4), differences


def test_killed_run_equals_the_whole_one(whole, killed):
    want = losses(whole)
    assert [step for step, *_ in want] == [3, 6, 9, 12, 15, 18, 21, 24]
    assert losses(killed) == want                        # exact: same bits


def test_killed_run_ends_with_the_same_state(whole, killed):
    for network, kind in (("generator", "weights"), ("generator", "ema"), ("fake_score", "exp_avg_sq")):
        want, got = (read_tensors(run / "checkpoints" / f"step-{STEPS:08d}", network, kind) for run in (whole, killed))
        assert want and got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want), f"{network} {kind}"


def test_nothing_half_written_is_left(killed):
    assert not [p for p in killed.rglob("*") if ".partial" in p.name or p.name.endswith(".old")]


def test_run_that_is_already_beyond_its_end_says_so(config, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    errors = finish(fork_training(config, run, 29726, "--set", "train.steps=3"))
    assert errors.count("sidfast: the run is already at step 24 of 3: nothing is left to train\n") == 1
    assert losses(run) == losses(whole)


def test_old_checkpoints_are_removed(whole):
    names = sorted(p.name for p in (whole / "checkpoints").iterdir())
    assert names == ["latest", "step-00000016", "step-00000020", "step-00000024"]
    assert (whole / "checkpoints" / "latest").read_text() == "step-00000024\n"


def test_truncated_checkpoint_falls_back_to_the_one_before(config, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    file = next((run / "checkpoints" / "step-00000024").glob("generator.ema-*"))
    file.write_bytes(file.read_bytes()[:-1000])
    errors = finish(fork_training(config, run, 29723))
    assert f"{file.name} has " in errors and "falling back" in errors
    assert "resuming from" in errors and "step-00000020" in errors
    assert losses(run) == losses(whole)


@pytest.mark.parametrize("damage", ["missing file", "no state", "broken state", "flipped bit"])
def test_damaged_checkpoints_are_never_taken(whole, group, tmp_path, damage):
    folder = tmp_path / "checkpoints"
    shutil.copytree(whole / "checkpoints", folder)
    newest = folder / "step-00000024"
    {"missing file": lambda: next(newest.glob("*.safetensors")).unlink(),
     "no state": lambda: (newest / "state.json").unlink(),
     "broken state": lambda: (newest / "state.json").write_text("{"),
     "flipped bit": lambda: flip_a_bit(next(newest.glob("fake_score.exp_avg_sq-*")))}[damage]()
    told = []
    assert choose_checkpoint(tmp_path, "auto", told.append).name == "step-00000020"
    assert len(told) == 1 and "step-00000024" in told[0]
    assert damage != "flipped bit" or "checksum" in told[0]
    for folder in (tmp_path / "checkpoints").glob("step-*"):
        (folder / "state.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match="no whole checkpoint is left; remove that folder"):
        choose_checkpoint(tmp_path, "auto", told.append)
    with pytest.raises(UserError, match="no complete checkpoint"):
        choose_checkpoint(tmp_path / "other", newest, told.append)


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.fixture
def small(tmp_path):
    return write_checkpoint(tmp_path / "checkpoints", 4, {"a": torch.ones(3)})


def test_every_bit_of_a_state_counts(small):
    """Also one that turns a number's e into an E."""
    state, chance = small / "state.json", random.Random(0)
    change(small, lambda values: values["extra"].update(sums=[[1e-9, 0.0, 0.0]]))
    whole = state.read_bytes()
    assert checkpoint_fault(small) is None
    bits = [8 * whole.index(b"e-09") + 5, *(chance.randrange(8 * len(whole)) for _ in range(500))]
    for bit in bits:
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        state.write_bytes(content)
        assert checkpoint_fault(small).startswith("state.json is broken ("), bit
    state.write_bytes(whole.replace(b'"optimizer_step": 1', b'"optimizer_step": 7'))
    assert checkpoint_fault(small) == "state.json is broken (its checksum differs)"


def change(folder, how):
    """Change a state.json, and its checksum with it."""
    values = read_state(folder)
    how(values)
    (folder / "state.json").write_text(seal(values | {"digest": ""}))


def test_a_checkpoint_is_of_the_step_in_its_name(small):
    copy = shutil.copytree(small, small.with_name("mine"))
    assert checkpoint_fault(copy) is None
    assert checkpoint_fault(copy.rename(small.with_name("step-00000009"))) == "state.json is of step 4"


FILE = "generator.ema-00000-of-00001.safetensors"


@pytest.mark.parametrize("how", [
    lambda s: s["files"][FILE].pop("sha256"), lambda s: s["files"][FILE].update(sha256="0"),
    lambda s: s["files"][FILE].update(bytes=True), lambda s: s["files"].pop(FILE), lambda s: s.update(files=[]),
    lambda s: s["files"].update({FILE.replace("00001", "00002"): s["files"][FILE]}),
    lambda s: s.pop("extra"), lambda s: s["extra"].pop("sums"), lambda s: s["extra"].update(sums=[[0.0]]),
    lambda s: s["extra"].update(step=5), lambda s: s["extra"]["in_a_row"].pop("generator"), lambda s: s.pop("engines"),
    lambda s: s["engines"].pop("fake_score"), lambda s: s["engines"]["generator"].update(loss_scale={"a": "b"}),
    lambda s: s.update(step=-1), lambda s: s.update(step="4"), lambda s: s.update(format=2)])
def test_ill_formed_state(small, how):
    change(small, how)
    assert re.fullmatch(r"state\.json is broken \([^\n]+\)", checkpoint_fault(small))


@pytest.mark.parametrize("text", ["", "[]", "7", "null", "\ufeff{}", "[" * 100_000, '{"a":' * 100_000, '{"digest": 1}',
                                  '{"digest": ""}', '{"digest": "\\ud800"}', "9" * 10_000, '{"format": 2, "step": 4}'])
def test_state_that_is_none(small, group, text):
    """The checkpoint before it is taken; an older format's is damaged, too."""
    older = write_checkpoint(small.parent, 3, {"a": torch.ones(3)})
    (small / "state.json").write_text(text)
    told = []
    assert find_checkpoint(small.parent, told.append) == older
    assert choose_checkpoint(small.parents[1], "auto", told.append) == older
    assert len(told) == 2 and all(f"{small} is damaged (state.json is broken (" in line for line in told)
    (small / "state.json").write_bytes(b"\xff\xfe")
    assert "state.json is broken" in checkpoint_fault(small)


def test_no_pickle_anywhere(whole):
    kinds = {p.suffix for p in whole.rglob("*") if p.is_file() and "tfevents" not in p.name}
    assert kinds <= {".json", ".jsonl", ".safetensors", ".png", ".py", ".txt", ".html", ".md", ""}


def test_average_equals_its_definition(config, tmp_path):
    """The average of method.md, section 8, recomputed from the weights of every step."""
    run = tmp_path / "run"
    finish(fork_training(config, run, 29724, "--set", "train.steps=4", "--set", "train.save_every=1", "--set",
                         "train.keep=9", "--set", "train.samples=0", "--set", "ema.half_life=9"))
    from sidfast.teachers.load import load_teacher

    folder = json.loads(config.read_text())["model"]["teacher"]
    average = {k: v.double() for k, v in load_teacher(folder).network.state_dict().items()}
    for step in range(1, 5):
        images = 4 * step
        decay = 0.5 ** (4 / min(9, 0.05 * images))
        weights = read_tensors(run / "checkpoints" / f"step-{step:08d}", "generator", "weights")
        average = {k: decay * v + (1 - decay) * weights[k].double() for k, v in average.items()}
    got = read_tensors(run / "checkpoints" / "step-00000004", "generator", "ema")
    for name, value in average.items():
        assert (got[name] - value).norm() <= 1e-5 * value.norm().clamp_min(1e-3), name


def test_run_directory_is_complete(whole):
    described = json.loads((whole / "config.json").read_text())
    assert described["config"]["train"]["steps"] == STEPS
    assert described["versions"]["torch"] and described["hardware"]["cpus"] and described["command"]
    assert {p.name for p in (whole / "samples").iterdir()} == {f"step-{n:08d}.png" for n in (0, 12, 24)}
    assert "after 24 updates" in (whole / "report.html").read_text()
    assert "text-to-image" in (whole / "export" / "README.md").read_text()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(whole / "tensorboard"))
    board.Reload()
    assert [e.step for e in board.Scalars("loss/generator")] == [step for step, *_ in losses(whole)]
