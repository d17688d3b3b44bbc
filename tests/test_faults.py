"""What runs do about faults: stopped and stuck processes, gradients that are not finite, loss spikes."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, Forked, environment, fork_training, losses, process_alone, run_jobs, wait_for_lines
from tiny import NO_MIDDLE, write_tiny_teacher

from sidfast.common.errors import Diverged, RunError
from sidfast.config.schema import Train
from sidfast.monitoring.spikes import Spikes
from sidfast.monitoring.watchdog import find_stalled
from sidfast.training import progress as progress_module
from sidfast.training.launch import join
from sidfast.training.progress import Progress

# ---- hanging processes

def report(beat, count, place="step 3, log", patient=False):
    return {"beat": beat, "count": count, "place": place, "patient": patient}


def verdict(*rounds, timeout=10):
    """The last verdict after rounds of (time, {rank: report})."""
    seen = {}
    for now, reports in rounds:
        result = find_stalled(seen, reports, now, timeout)
    return result


def test_a_process_that_never_spoke_is_silent():
    start = {"beat": 0, "count": 0, "place": "start", "patient": False}
    seen = dict.fromkeys(range(2), (start, 0.0, 0.0))
    for beat, now in enumerate((4.0, 8.0, 12.0), 1):
        found = find_stalled(seen, {0: {"beat": beat, "count": 1, "place": "step 2", "patient": False}}, now, 10)
    assert found == ([1], "has not answered for 10 s", "start")
    assert find_stalled(dict.fromkeys(range(2), (start, 0.0, 0.0)), {}, 12.0, 10) == (
        [0, 1], "have not answered for 10 s", "start")


def test_a_process_that_says_nothing_is_at_fault():
    ranks, what, place = verdict((0, {0: report(1, 5), 1: report(1, 4, "step 2, data")}),
                                 (11, {0: report(12, 5), 1: report(1, 4, "step 2, data")}))
    assert ranks == [1] and "10 s" in what and place == "step 2, data"


def test_a_process_that_fell_silent_ahead_of_the_others_is_at_fault():
    rounds = [(now, {0: report(now, 5), 1: report(min(now, 3), 6)}) for now in range(15)]
    assert verdict(*rounds[:13])[0] == []
    assert verdict(*rounds)[0] == [1]


def test_a_process_that_the_others_wait_for_is_at_fault():
    ranks, what, place = verdict((0, {0: report(1, 5), 1: report(1, 4, "step 2, data"), 2: report(1, 5)}),
                                 (11, {0: report(9, 5), 1: report(9, 4, "step 2, data"), 2: report(9, 5)}))
    assert ranks == [1] and "progress" in what and place == "step 2, data"


def test_no_process_is_at_fault():
    assert verdict((0, {0: report(1, 5), 1: report(1, 4)}), (11, {0: report(9, 6), 1: report(9, 4)}))[0] == []
    assert verdict((0, {0: report(1, 5), 1: report(1, 4)}), (9, {0: report(9, 5), 1: report(9, 4)}))[0] == []
    patient = {0: report(9, 5, "evaluation", patient=True), 1: report(9, 5)}
    assert verdict((0, {0: report(1, 5), 1: report(1, 5)}), (99, patient), (999, {
        rank: r | {"beat": 10} for rank, r in patient.items()}))[0] == []


def start_two(config, out, port, *args):
    """Two processes without a launcher."""
    command = [sys.executable, "sidfast/train.py", "--config", str(config), "--out", str(out), *args]
    return [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment(port) | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1"})
        for rank in range(2)]


def test_collective_calls_wait_longer_than_the_watch(monkeypatch):
    """In the groups that DeepSpeed makes, too: else they would end a run while its first process measures, and before a
    process that hangs is named."""
    from deepspeed import comm
    from deepspeed.utils import groups
    from torch.distributed import distributed_c10d

    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):               # (both are put back afterwards)
        monkeypatch.setattr(distributed_c10d, name, getattr(distributed_c10d, name))
    process_alone(monkeypatch)
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "1")
    join()
    try:
        for group in (torch.distributed.group.WORLD, groups._clone_world_group(), torch.distributed.new_group()):
            timeout = group._get_backend(torch.device("cpu")).options._timeout
            assert timeout.total_seconds() > 100 * Train.model_fields["hang_timeout"].default
    finally:
        comm.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_stopped_process_is_named(write_config, tmp_path, rank):
    config = write_config(**{"train.steps": 10000, "train.hang_timeout": 30.0})
    processes = start_two(config, tmp_path / "run", 29902 + rank)
    try:
        wait_for_lines(tmp_path / "run", 2, processes)
        time.sleep(10)                                   # (they say where they are every 30 / 8 s, if not kept waiting)
        processes[rank].send_signal(signal.SIGSTOP)
        _, errors = processes[1 - rank].communicate(timeout=120)
    finally:
        for process in processes:
            process.kill()
    assert processes[1 - rank].returncode == 1
    assert re.search(rf"sidfast: process {rank} (has not answered for 30 s|does not answer); last seen at: step \d+, "
                     r".*\. The run ends; the last good checkpoint is none", errors), errors[-2000:]


# ---- gradients that are not finite

@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_non_finite_gradient_skips_the_update_everywhere(tmp_path, processes):
    teacher = write_tiny_teacher(tmp_path / "teacher", unet_blocks=NO_MIDDLE)
    out = tmp_path / "result.json"
    run_jobs({"teacher": str(teacher), "out": str(out)}, tmp_path, processes, 29904 + processes,
             script="tests/faulty_gradients.py")
    result = json.loads(out.read_text())
    assert len(result) == 16
    for case, everyone in result.items():
        for rows in everyone:
            assert rows == [[0, True, True], [1, False, True], [1, True, True], [1, True, True]], case


class NoSaver:
    folder = "/nowhere"

    def wait(self):
        pass


def test_too_many_skipped_updates_end_the_run():
    progress = Progress()
    for skipped in (1, 1, 0, 1, 1):
        progress.count_skipped("generator", skipped, 3, NoSaver())
    assert progress.skipped == 4 and progress.in_a_row == {"generator": 2, "fake_score": 0}
    with pytest.raises(RunError, match=r"last 3 updates of the generator .* The last good checkpoint is none"):
        progress.count_skipped("generator", 1, 3, NoSaver())


def test_run_without_a_finite_sample_ends(group, monkeypatch):
    monkeypatch.setattr(progress_module, "comm", torch.distributed)              # (DeepSpeed's has no group here)
    progress = Progress(step=7, logged=3, sums=sums_of(4 * 4, 4 * 4))
    with pytest.raises(RunError, match=r"every sample of the fake_score and the generator in the last 4 steps was "
                                       r"non-finite: .* at step 7\. The last good checkpoint is none; begin again with "
                                       "lower learning rates"):
        progress.reduce(4, NoSaver())


def sums_of(fake_score, generator):
    """Progress.sums with so many samples left out."""
    return [torch.tensor(v) for v in (0.5, -0.5, float(fake_score), float(generator))]


@pytest.mark.parametrize("lost, name", [((16, 15), "fake_score"), ((0, 16), "generator")])
def test_a_network_without_a_finite_sample_ends_the_run(group, monkeypatch, lost, name):
    """At a log line and at a checkpoint; from the first step on, it is not the learning rate."""
    monkeypatch.setattr(progress_module, "comm", torch.distributed)
    of = f"every sample of the {name} in the"
    for act in (Progress.reduce, Progress.describe):
        with pytest.raises(Diverged, match=f"{of} last 4 steps was non-finite: .* with lower learning rates "):
            act(Progress(step=7, logged=3, sums=sums_of(*lost)), 4, NoSaver())
        with pytest.raises(Diverged, match=f"{of} first 4 steps was .*Lower learning rates do not help .*fp16"):
            act(Progress(step=4, sums=sums_of(*lost)), 4, NoSaver())
        assert act(Progress(step=7, logged=3, sums=sums_of(15, 15)), 4, NoSaver())
    assert Progress(step=7, logged=7).describe(4, NoSaver())["sums"] == [[0.0] * 4]      # (just after a log line)


def test_samples_left_out_are_counted_for_each_network(group, monkeypatch):
    monkeypatch.setattr(progress_module, "comm", torch.distributed)
    progress = Progress(step=5, logged=3, sums=sums_of(3, 1))
    assert progress.reduce(4, NoSaver()) == {
        "fake_score_loss": 0.25, "generator_loss": -0.25, "non_finite": 4.0, "non_finite/fake_score": 3.0,
        "non_finite/generator": 1.0, "skipped_updates": 0}
    assert (progress.sums, progress.logged) == ([0.0] * 4, 5)


def test_sums_of_older_checkpoints_and_of_other_numbers_of_processes():
    extra = Progress(step=8, images=32, logged=6).__dict__ | {"sums": [[1.0, 2.0, 6.0], [3.0, 6.0, 0.0]]}
    assert [Progress.resume(extra, rank, 2).sums for rank in range(2)] == [[1.0, 2.0, 3.0, 3.0], [3.0, 6.0, 0.0, 0.0]]
    assert Progress.resume(extra, 3, 4).sums == [2.0, 4.0, 0.75, 0.75]
    extra["sums"] = [[1.0, 2.0, 6.0, 4.0], [3.0, 6.0, 0.0, 2.0]]
    assert Progress.resume(extra, 1, 2).sums == [3.0, 6.0, 0.0, 2.0]
    assert Progress.resume(extra, 0, 1).sums == [2.0, 4.0, 6.0, 6.0]


def test_diverged_run_names_its_last_good_checkpoint(write_config, tmp_path):
    config = write_config(**{"train.save_every": 1, "optimizer.generator.lr": 1e30})
    _, errors = (process := fork_training(config, tmp_path / "run", 29910)).communicate()
    assert process.returncode == 1
    assert ("sidfast: a network's output is not finite for any input: the run has diverged at step 2. The last good "
            f"checkpoint is {tmp_path}/run/checkpoints/step-00000001; go on from it (--resume PATH) with lower "
            "learning rates and another --out\n") in errors, errors[-2000:]


@pytest.mark.parametrize("changes", [{"train.log_every": 10, "train.save_every": 2}, {"train.log_every": 2}],
                         ids=["checkpoint", "log"])
def test_run_whose_fake_score_never_learns(write_config, tmp_path, changes):
    """Its images, the teacher's, are infinite, and the generator's are not. No checkpoint and no export is left."""
    config = write_config(**{"train.steps": 6, "evaluation.images": 0, "synthetic.teacher_share": 1.0,
                             "synthetic.teacher_steps": 2, "synthetic.teacher_guidance": 1e38} | changes)
    _, errors = (process := fork_training(config, tmp_path / "run", 29910)).communicate()
    assert process.returncode == 1, errors[-2000:]
    assert errors.rstrip().splitlines()[-1].startswith(
        "sidfast: every sample of the fake_score in the first 2 steps was non-finite and was left out; the run ends. ")
    assert {p.name for p in (tmp_path / "run").iterdir()} <= {
        "config.json", "samples", "tensorboard", "metrics.jsonl", ".lock"}


# ---- loss spikes

class Prompts:
    def prompt(self, step, update, row):
        return f"{update} {step} {row}"


def test_spikes_name_their_samples(group):
    spikes = Spikes(5.0, Prompts())
    t = torch.tensor([10, 20, 30])
    for step in range(30):
        usual = torch.tensor([1.0, -2.0, -2.0])
        high = torch.tensor([0.0, 90.0, 3.0]) if step == 25 else usual
        spikes.add(step, {"fake_score": (usual, t), "generator": (high, t)})
        if step == 14:
            assert spikes.take() == []
    found, = spikes.take()
    assert (found["step"], found["network"], found["loss"], found["median"]) == (25, "generator", 31.0, 1.0)
    assert found["samples"][0] == {"loss": 90.0, "t": 20, "prompt": "generator 25 1"}
    assert [s["t"] for s in found["samples"]] == [20, 30, 10]
    assert spikes.take() == []


# ---- all of it together

def run_chaos(*args):
    done = Forked("tests/chaos.py", args, 0)
    code = done.wait(3000)
    text, errors = done.communicate()
    assert code == 0, text[-3000:] + errors[-3000:]
    return text


def test_a_little_chaos():
    text = run_chaos("--faults", "3", "--seed", "5", "--port", "29910", "--ranks", "2", "--kinds", "SIGTERM",
                     "kill during checkpoint", "disk full")
    assert re.search(r"\n3 faults in \d+ runs, \d+ s: all ended like the undisturbed one", text), text


@pytest.mark.slow
def test_much_chaos():
    assert "all ended like the undisturbed one" in run_chaos("--faults", "30", "--seed", "6", "--port", "29910")


@pytest.mark.slow
def test_two_processes_one_and_two_again(tiny_config, tmp_path):
    """A run that goes on with another number of processes, twice, follows the curve of one that was left alone."""
    def job(steps, out):
        return {"config": tiny_config | {"train": tiny_config["train"] | {"steps": steps, "save_every": 4}},
                "out": str(out)}

    run_jobs([job(12, tmp_path / "whole"), job(4, tmp_path / "run")], tmp_path, 2, 29915)
    run_jobs([job(8, tmp_path / "run")], tmp_path, 1, 29916)
    run_jobs([job(12, tmp_path / "run")], tmp_path, 2, 29917)
    want, got = losses(tmp_path / "whole"), losses(tmp_path / "run")
    assert [row[0] for row in got] == list(range(1, 13))
    worst = max(abs(a - b) / abs(b) for x, y in zip(got, want, strict=True) for a, b in zip(x[1:], y[1:], strict=True))
    print(f"largest relative difference of a loss: {worst:.1e}")
    assert worst < 1e-4
