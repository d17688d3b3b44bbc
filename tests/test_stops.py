"""How a run ends and is gone on with: signals, the lock, `latest`, counters, and which settings may change."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, losses
from helpers_checkpoint import EXTRA, STATE, write_checkpoint
from helpers_input import fails
from helpers_training import train_here

from sidfast import train
from sidfast.checkpoints.format import read_state
from sidfast.checkpoints.store import by_age, complete, content_fault, step_folder
from sidfast.common.errors import UserError
from sidfast.config.schema import load_config
from sidfast.monitoring.spikes import Spikes
from sidfast.runs import lock
from sidfast.runs.directory import is_complete, open_run
from sidfast.teachers.fingerprint import fingerprint
from sidfast.teachers.load import load_teacher
from sidfast.teachers.paths import DiscreteBetas
from sidfast.training import progress as progress_module
from sidfast.training.loop import Loop
from sidfast.training.progress import Progress


def signal_in_step(number, which):
    """A patch: the signal comes while this step is made."""
    step = Loop._step

    def signalled(loop):
        if loop.progress.step == number - 1:
            signal.raise_signal(which)
        step(loop)

    return Loop, "_step", signalled


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda s: s.name)
def test_a_stopped_run_has_saved(write_config, tmp_path, capfd, which):
    """Its last step, though no checkpoint was due; and its export is not written. Ctrl-C is answered first."""
    config, out = write_config(**{"train.steps": 50}), tmp_path / "run"
    train_here(config, out, patches=[signal_in_step(3, which)])
    assert [folder.name for folder in by_age(out / "checkpoints")] == ["step-00000003"]
    assert [step for step, *_ in losses(out)] == [1, 2, 3] and not (out / "export").exists()
    assert f"stopped by {which.name} after step 3; the last checkpoint is {out}/checkpoints/step-00000003, the same " \
           "command goes on from there" in (said := capfd.readouterr().err)
    assert ("sidfast: stopping after this step and saving" in said) == (which == signal.SIGINT)


def test_a_signal_in_the_last_step_is_too_late(write_config, tmp_path, capsys):
    """All that belongs to the end of a run is there, down to steps that fall on no multiple of an interval."""
    config = write_config(**{"train.steps": 3, "train.log_every": 2, "train.samples": 1, "train.sample_every": 2})
    train_here(config, tmp_path / "run", patches=[signal_in_step(3, signal.SIGTERM)])
    assert "stopped by" not in capsys.readouterr().err
    assert [step for step, *_ in losses(tmp_path / "run")] == [2, 3]
    assert [path.name for path in sorted((tmp_path / "run" / "samples").iterdir())] == [
        f"step-{step:08d}.png" for step in (0, 2, 3)]
    assert (tmp_path / "run" / "export" / "model_index.json").is_file()


def test_intervals_of_0_and_checkpoints_by_the_clock(capsys, write_config, tmp_path):
    """0 stands for the start and the end alone. Started again, the run does nothing again but what is not there."""
    config, out = write_config(**{"train.steps": 3, "train.log_every": 0, "train.sample_every": 0, "train.samples": 1,
                                  "train.save_every": 0, "train.save_minutes": 1e-9, "train.keep": 9}), tmp_path / "run"
    train_here(config, out)
    assert [step for step, *_ in losses(out)] == [3]
    assert sorted(path.name for path in (out / "samples").iterdir()) == ["step-00000000.png", "step-00000003.png"]
    assert [folder.name for folder in by_age(out / "checkpoints")] == [f"step-0000000{n}" for n in (3, 2, 1)]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != lock.NAME}

    assert train_here(config, out) is None
    assert "already at step 3 of 3: nothing is left to train" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert is_complete(out, load_config(config), 3)
    for change in ("evaluation.images=200", "train.samples=2"):
        assert not is_complete(out, load_config(config, [change]), 3)
    (out / "samples" / "step-00000003.png").unlink()
    assert not is_complete(out, load_config(config), 3)

    line = fails(capsys, train.main, "--config", config, "--out", tmp_path / "new", "--set",
                 f"model.teacher={out / 'export'}")
    assert f"model.teacher: {out / 'export'} is a student, and a student is not a teacher" in line
    other = fails(capsys, train.main, "--config", config, "--out", out, "--set", "loss.alpha=1.1")
    assert other.endswith(f"; choose another --out (and --resume {out}/checkpoints/step-00000003 to start from its "
                          "weights)")


@pytest.mark.parametrize("minutes, saved", [(1e6, []), (10.0, [3, 6])])
def test_a_checkpoint_is_due_by_the_first_process_s_clock(monkeypatch, minutes, saved):
    """Once each time, counted from the one before."""
    config, clock = SimpleNamespace(train=SimpleNamespace(save_minutes=minutes)), iter(range(0, 10_000, 200))
    monkeypatch.setattr("sidfast.training.loop.time", SimpleNamespace(monotonic=lambda: next(clock)))
    for run, want in ((object(), saved), (None, [])):
        loop = SimpleNamespace(config=config, run=run, _saved=next(clock))
        assert [step for step in range(1, 8) if Loop._asks_to_save(loop)] == want


# ---- one job at a time

CLAIM = """
import sys
from sidfast.runs.lock import claimed
with claimed(sys.argv[1], sys.argv[2] == "first", 0.3):
    print("held", flush=True)
    sys.stdin.read()
"""


def claiming(out, which):
    return subprocess.Popen([sys.executable, "-c", CLAIM, str(out), which], cwd=ROOT, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                            env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"})


def test_only_processes_of_the_same_job_join(tmp_path):
    """Those that have the first one's parent: a launcher starts them all."""
    def claim_as_another(patience=0.3):
        with lock.claimed(tmp_path, False, patience):
            pass

    processes = [claiming(tmp_path, "first")]
    try:
        assert processes[0].stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another job is training there"):
            claim_as_another()                           # (our parent is another one)
        processes.append(claiming(tmp_path, "other"))
        assert processes[1].stdout.readline() == "held\n"
    finally:
        for process in processes:
            process.communicate()
    claim_as_another(5)


# ---- checkpoints

def test_latest_names_what_is_there(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, 4, {"a": torch.ones(3)})
    rename = Path.rename

    def failing(path, target):
        if path.name.startswith(".partial-"):
            raise OSError("no space left")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no space left"):
        write_checkpoint(tmp_path, 8, {"a": torch.ones(3)})
    assert (tmp_path / "latest").read_text() == "step-00000004\n"


def test_processes_share_the_reading_of_a_checkpoint(tmp_path):
    """Whichever file is damaged, one of them finds it, and it alone."""
    folder = write_checkpoint(tmp_path, 4, {"a": torch.ones(3), "b": torch.ones(2)}, ranks=2)
    names = sorted(read_state(folder)["files"])
    assert len(names) == 10
    for number, name in enumerate(names):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        found = [content_fault(folder, rank, 3) for rank in range(3)]
        assert [bool(fault) for fault in found] == [rank == number % 3 for rank in range(3)]
        assert found[number % 3].startswith(f"{name} is not what was written")
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("network", ["generator", "fake_score"])
def test_the_last_good_checkpoint_of_a_diverging_run_stays(tmp_path, network):
    """Also where one network alone leaves its updates out."""
    for step in (1, 2, 3, 4):
        partial, skipped = step_folder(tmp_path, step, partial=True), EXTRA["in_a_row"] | {network: max(0, step - 2)}
        partial.mkdir()
        files = read_state(write_checkpoint(tmp_path / "other", step, {"a": torch.ones(3)}))["files"]
        for name in files:
            (tmp_path / "other" / f"step-{step:08d}" / name).rename(partial / name)
        complete(tmp_path, step, STATE | {"step": step, "files": files, "extra": EXTRA | {
            "step": step, "in_a_row": skipped}}, keep=1)
    assert [folder.name for folder in by_age(tmp_path)] == ["step-00000004", "step-00000002"]


# ---- counters

class NoSaver:
    folder = "/nowhere"

    def wait(self):
        pass


@pytest.fixture
def progress(group, monkeypatch):
    monkeypatch.setattr(progress_module, "comm", torch.distributed)              # (DeepSpeed's has no group here)
    return Progress(step=2, images=8, sums=[torch.tensor(v) for v in (1.0, 3.0, 1.0, 2.0)])


def test_a_line_counts_from_the_one_before(progress):
    progress.count_skipped("generator", 1, 50, NoSaver())
    assert progress.reduce(4, NoSaver()) == {"fake_score_loss": 0.5, "generator_loss": 1.5, "non_finite": 3.0,
                                             "non_finite/fake_score": 1.0, "non_finite/generator": 2.0,
                                             "skipped_updates": 1}
    progress.step, progress.sums = 3, [torch.tensor(v) for v in (2.0, 4.0, 0.0, 0.0)]
    assert progress.reduce(4, NoSaver()) == {"fake_score_loss": 2.0, "generator_loss": 4.0, "non_finite": 0.0,
                                             "non_finite/fake_score": 0.0, "non_finite/generator": 0.0,
                                             "skipped_updates": 0}


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_sums_of_another_number_of_processes(processes):
    """Losses are means over processes, samples left out are a sum."""
    extra = EXTRA | {"step": 7, "sums": [[1.0, 2.0, 3.0, 1.0], [3.0, 6.0, 5.0, 1.0]]}
    sums = torch.tensor([Progress.resume(extra, rank, processes).sums for rank in range(processes)])
    assert sums[:, :2].mean(0).tolist() == [2.0, 4.0] and sums[:, 2:].sum(0).tolist() == pytest.approx([8.0, 2.0])


def test_a_spike_downwards_names_its_samples(group):
    class Prompts:
        def prompt(self, step, update, row):
            return f"row {row}"

    spikes, t = Spikes(5.0, Prompts()), torch.arange(6)
    for step in range(12):
        spikes.add(step, {"generator": (torch.tensor([1.0, 2, -2, 1, 0, 1]) if step < 11 else torch.tensor(
            [1.0, 9, -90, 2, -40, 0]), t)})
    [found] = spikes.take()
    assert [sample["loss"] for sample in found["samples"]] == [-90.0, -40.0, 9.0, 2.0]
    assert [sample["prompt"] for sample in found["samples"]] == ["row 2", "row 4", "row 1", "row 3"]


# ---- what may change when a run goes on

BOUND = {"optimizer.generator.lr": 2e-3, "optimizer.fake_score.eps": 1e-5, "loss.alpha": 0.7, "ema.half_life": 9.0,
         "noise.t_init": 500, "noise.t_max": 900, "guidance.kappa1": 2.0, "guidance.prompt_dropout": 0.3,
         "synthetic.temperature": 0.9, "train.batch_size": 8, "train.seed": 1, "data.prompts": "shapes:all",
         "model.resolution": 32, "deepspeed.bf16.enabled": True, "deepspeed.fp16.enabled": True,
         "deepspeed.gradient_clipping": 1.0, "deepspeed.generator.gradient_clipping": 1.0,
         "speed.share_generator_forward": True}
FREE = {"train.steps": 30, "train.log_every": 7, "train.save_every": 5, "train.save_minutes": 5.0, "train.keep": 3,
        "train.samples": 1, "train.micro_batch": 4, "train.fake_score_factor": 2, "train.spike": None,
        "evaluation.every": 5,
        "speed.tf32": False, "speed.gradient_checkpointing": True, "deepspeed.zero_optimization.stage": 2}


@pytest.mark.parametrize("key", [*BOUND, *FREE])
def test_settings_of_a_run_that_goes_on(write_config, tmp_path, key):
    path, out = write_config(), tmp_path / "run"
    for name in ("", "checkpoints"):
        (out / name).mkdir()
    (out / "config.json").write_text(json.dumps({"config": load_config(path).model_dump()}))
    value = json.dumps({**BOUND, **FREE}[key])
    changed = load_config(path, [f"{key}={value}"])
    if key in FREE:
        open_run(out, changed, "auto")
        return
    with pytest.raises(UserError, match=rf"holds a run with another configuration \({key} is "):
        open_run(out, changed, "auto")


def test_a_teacher_is_known_by_all_of_its_parts(tiny_teacher):
    teacher = load_teacher(str(tiny_teacher))
    seen = {fingerprint(teacher)}
    for module in teacher.networks.values():
        for name, parameter in list(module.named_parameters())[::10]:
            with torch.no_grad():
                parameter.flatten()[0] += 1
            seen.add(fingerprint(teacher))
            assert len(seen) > 1, name
    count = sum(len(list(module.parameters())[::10]) for module in teacher.networks.values())
    levels = teacher.parts["scheduler"].alphas_cumprod
    other = dataclasses.replace(teacher, schedule=DiscreteBetas(levels, "v_prediction"))
    assert len(seen) == 1 + count and fingerprint(other) not in seen
