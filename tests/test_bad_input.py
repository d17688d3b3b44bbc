"""A mistake in settings or on a command line: one clear line on standard error, exit code 2, nothing written, lost."""

import io
import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, fork_training, free_port, start_launcher
from helpers_input import fails

import sidfast
from sidfast import cli, train
from sidfast.accel import plan as speed
from sidfast.common import errors
from sidfast.common.environment import check_environment, omp_threads, prepare_environment
from sidfast.training import launch


@pytest.mark.parametrize("setting, words", [
    ("train.stepz=3", ["unknown key train.stepz", "train.steps"]),
    ("guidence.kappa1=3", ["unknown key guidence", "guidance"]),
    ("train.batch_size=many", ["train.batch_size", "'many'"]),
    ("speed.fused=maybe", ["speed.fused", "boolean or 'auto'", "'maybe'"]),
    ("speed.attention=fast", ["speed.attention", "'efficient' or 'math', not 'fast'"]),
    ("train.micro_batch=0", ["train.micro_batch", "1 or 'auto'", "0"]),
    ("train.batch_size=5", ["train.batch_size (5)", "train.micro_batch (2)"]),
    ("noise.t_min=990", ["noise.t_min (990)", "noise.t_max (979)"]),
    ("noise.density=uniform", ["noise.density", "'uniform'", "ddpm"]),
    ("noise.t_init=5000", ["noise.t_init (5000)", "1000"]),
    ("noise.t_max=5000", ["noise.t_max"]),
    ("deepspeed.bf16=true", ["deepspeed.bf16", "section"]),
    ("deepspeed.bf16.enabled=yes", ["deepspeed.bf16.enabled", "true or false", "'yes'"]),
    ("deepspeed.fp16.enabled=1", ["deepspeed.fp16.enabled", "true or false", "1"]),
    ("deepspeed.generator.gradient_clipping=true", ["deepspeed.generator.gradient_clipping", "a number", "True"]),
    ('deepspeed.zero_optimization.stage="3"', ["deepspeed.zero_optimization.stage", "0, 1, 2 or 3", "'3'"]),
    ("deepspeed.zero_stage=2", ["deepspeed.zero_stage", "did you mean zero_optimization?"]),
    ("deepspeed.bf16.enable=true", ["unknown key deepspeed.bf16.enable; did you mean deepspeed.bf16.enabled?"]),
    ("deepspeed.fake_score.zero_optimization.stag=2", ["deepspeed.fake_score.zero_optimization.stage?"]),
    ('deepspeed.zero_optimization.offload_optimizer={"devise": "cpu"}', ["deepspeed.zero_optimization.offload_optimizer"
                                                                         ".device?"]),
    ("deepspeed.zero_optimization.cpu_offload=true", ['.offload_optimizer to {"device": "cpu"} instead']),
    ('deepspeed.zero_optimization={"stage": 2, "offload_param": {"device": "cpu"}}', ["offload_param", "stage 3"]),
    ('deepspeed.zero_optimization={"stage": 2, "offload_optimizer": {"device": "nvme"}}', ["nvme", "stage 3"]),
    ('deepspeed.zero_optimization={"stage": 3, "offload_optimizer": {"device": "nvme"}}', ["nvme_path"]),
    ("deepspeed.zero_optimization.offload_optimizer=3", ["deepspeed.zero_optimization.offload_optimizer", "section"]),
    ("deepspeed.zero_optimization.reduce_bucket_size=-1", ["deepspeed.zero_optimization.reduce_bucket_size: ", "-1"]),
    ("noise.std=2", ["noise.std", "ddpm"]),
    ("optimizer.generator.lr=-1", ["optimizer.generator.lr", "-1"]),
    ("deepspeed.optimizer={}", ["deepspeed.optimizer", "optimizer"]),
    ("data.prompts=shapes:test", ["shapes:test", "shapes:train"]),
    ("data.prompts=/nowhere.txt", ["/nowhere.txt"]),
    ("model.teacher=/nowhere", ["model.teacher", "/nowhere"]),
    ("steps", ["--set steps"]),
], ids=lambda v: v if isinstance(v, str) else "")
def test_settings(capsys, write_config, tmp_path, setting, words):
    line = fails(capsys, train.main, "--config", write_config(), "--out", tmp_path / "run", "--set", setting)
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


@pytest.fixture
def launched(monkeypatch):
    """launched(**variables): an environment with these of a launcher's variables and no other."""
    def change(**variables):
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
                     "OMP_NUM_THREADS", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
            monkeypatch.setenv(name, variables.get(name, ""))
            if name not in variables:
                monkeypatch.delenv(name)

    return change


def test_batch_does_not_divide_among_processes(capsys, write_config, tmp_path, launched):
    launched(WORLD_SIZE="3")
    line = fails(capsys, train.main, "--config", write_config(), "--out", tmp_path / "run")
    assert "train.batch_size (4)" in line and "2 x 3 = 6" in line


@pytest.mark.parametrize("variables", [
    {"WORLD_SIZE": "abc"}, {"WORLD_SIZE": "0"}, {"WORLD_SIZE": "-1"}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "9" * 5000},
    {"RANK": "x"}, {"RANK": "3", "WORLD_SIZE": "2"}, {"RANK": "1"}, {"LOCAL_RANK": "a"}, {"LOCAL_SIZE": "0"},
    {"LOCAL_WORLD_SIZE": "two"}, {"OMP_NUM_THREADS": "0"}, {"OMP_NUM_THREADS": "many"}, {"OMP_NUM_THREADS": "2,"},
    {"MASTER_PORT": "abc"}, {"MASTER_PORT": "99999999"}, {"MASTER_PORT": "0", "WORLD_SIZE": "2"}],
    ids=lambda v: " ".join(f"{name}={value[:9]}" for name, value in v.items()))
def test_environment(capsys, write_config, tmp_path, launched, variables):
    launched(**variables)
    name, value = next(iter(variables.items()))
    for call in ((train.main, "--config", write_config(), "--out", tmp_path / "run"),
                 (cli.main, "report", "--run", tmp_path)):
        assert f"{name}={value[:400]}" in fails(capsys, *call)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("variables", [
    {"SLURM_NTASKS": "2"}, {"SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "8"}, {"OMPI_COMM_WORLD_SIZE": "4"},
    {"PMI_SIZE": "3"}, {"SLURM_NTASKS": "1", "OMPI_COMM_WORLD_SIZE": "1"}], ids=str)
def test_processes_that_do_not_know_of_each_other(capsys, write_config, tmp_path, launched, variables):
    """As `srun -n 2 python sidfast/train.py` starts them; commands other than training may run in a job of several."""
    launched(**variables)
    check_environment()
    name, tasks = next(iter(variables.items()))
    if tasks == "1":
        check_environment(training=True)
        return
    line = fails(capsys, train.main, "--config", write_config(), "--out", tmp_path / "run")
    assert f"{name}={tasks}, but WORLD_SIZE is not set: the {tasks} processes would each train alone" in line
    assert "WORLD_SIZE=$SLURM_NTASKS RANK=$SLURM_PROCID" in line and not (tmp_path / "run").exists()
    for known in ({"WORLD_SIZE": "1"}, {"WORLD_SIZE": "2", "RANK": "1"}, {"SLURM_STEP_NUM_TASKS": "1"}):
        if name == "SLURM_NTASKS" or "WORLD_SIZE" in known:
            launched(**(variables | known))
            check_environment(training=True)


def test_environment_that_is_fine(launched):
    launched()
    check_environment()
    assert omp_threads() is None and errors.speaks()
    launched(WORLD_SIZE="2", RANK="1", LOCAL_RANK="1", LOCAL_SIZE="2", MASTER_PORT="29500", OMP_NUM_THREADS="2,1")
    check_environment()
    assert omp_threads() == 2 and not errors.speaks()


@pytest.mark.parametrize("given, taken", [({}, "0"), ({"MASTER_PORT": "29777"}, "29777"),
                                          ({"WORLD_SIZE": "2", "RANK": "0"}, "29500")], ids=["alone", "given", "two"])
def test_port(monkeypatch, launched, given, taken):
    """A process alone takes a port that is free."""
    launched(OMP_NUM_THREADS=str(torch.get_num_threads()), **given)
    monkeypatch.setattr(launch, "_meet", lambda *_: None)
    launch.join()
    assert os.environ["MASTER_PORT"] == taken


def test_port_that_is_taken(write_config, tmp_path):
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        run = fork_training(write_config(), tmp_path / "run", port)
        output, error = run.communicate()
    assert run.returncode == 2 and output == "", error
    assert [line for line in error.splitlines() if "port" in line] == error.splitlines() and "Traceback" not in error
    assert f"sidfast: port {port} is taken on this machine" in error and "--master_port PORT" in error
    assert not (tmp_path / "run").exists()


def test_a_mistake_under_the_launcher(write_config, tmp_path):
    """Of two processes one speaks, in one line."""
    run = start_launcher("--module", "sidfast.train", "--config", write_config(), "--out", tmp_path / "run", "--set",
                         "train.stepz=3", processes=2, port=free_port(), DS_ACCELERATOR="cpu")
    output, error = run.communicate(timeout=200)
    assert (run.returncode, output, len(error.splitlines())) == (2, "", 1), error
    assert error.startswith("sidfast: ") and "unknown key train.stepz" in error and not (tmp_path / "run").exists()


def test_a_process_that_is_refused_alone_says_so(capsys, launched, monkeypatch):
    """After it has waited for the first process to say it for all."""
    waited = []
    monkeypatch.setattr(errors.time, "sleep", waited.append)
    for rank in "01":
        launched(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_SIZE="2")
        assert "no such file" in fails(capsys, train.main, "--config", "/nowhere.json")
        assert len(waited) == int(rank)


def test_version_and_module():
    done = subprocess.run([sys.executable, "-m", "sidfast", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"sidfast {sidfast.__version__}\n", "")


def test_config_with_a_byte_order_mark(capsys, write_config, tmp_path):
    config = write_config(**{"loss.alpha": 0.7})
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    assert train.main(["--config", str(config), "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"]["alpha"] == 0.7


def test_a_locale_that_knows_ascii_alone(write_config, tmp_path):
    """Names with other letters, as arguments and in files, are read and told of."""
    config = write_config("größe-猫.json", **{"model.teacher": "bär"})
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = ["--config", config, "--out", tmp_path / "ü", "--dry-run"]
    done = subprocess.run([sys.executable, "sidfast/train.py", *words], cwd=ROOT, env=env, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"") and json.loads(done.stdout)["model"]["teacher"] == "bär"


def test_output_that_knows_ascii_alone(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    prepare_environment()
    errors.say("bär")
    assert written.getvalue() == b"b\\xe4r\n"


def test_config_that_is_no_json(capsys, tmp_path):
    (tmp_path / "c.json").write_text('{"model": {\n"teacher": }')
    assert "c.json, line 2" in fails(capsys, train.main, "--config", tmp_path / "c.json")
    assert "no such file" in fails(capsys, train.main, "--config", tmp_path / "d.json")
    (tmp_path / "c.json").write_text('{"train": "x"}')
    assert "train: must be a section, not 'x'" in fails(capsys, train.main, "--config", tmp_path / "c.json")


@pytest.mark.parametrize("content, words", [
    (b"", "is empty"), (b"\n  \n", "empty lines"), (b"a cat\n\xff\xfe dog\n", "line 2: not UTF-8")],
    ids=["empty", "blank", "not-utf8"])
def test_prompts(capsys, write_config, tmp_path, content, words):
    (tmp_path / "prompts.txt").write_bytes(content)
    config = write_config(**{"data.prompts": str(tmp_path / "prompts.txt")})
    line = fails(capsys, train.main, "--config", config, "--out", tmp_path / "run")
    assert "prompts.txt" in line and words in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("setting", ["speed.fused=true", "speed.cuda_graphs=true", "speed.attention=flash"])
def test_speed_that_needs_a_gpu(capsys, write_config, tmp_path, monkeypatch, setting):
    monkeypatch.setattr(speed, "INTERPRETED", False)
    monkeypatch.setattr(speed.torch.cuda, "is_available", lambda: False)
    line = fails(capsys, train.main, "--config", write_config(), "--out", tmp_path / "run", "--set", setting)
    assert setting.partition("=")[0] in line and "there is no GPU here" in line
    assert not (tmp_path / "run").exists()


def test_names_that_are_empty(capsys, tiny_teacher, tmp_path):
    assert "--config '': is empty" in fails(capsys, train.main, "--config", "")
    assert "--config '': is empty" in fails(capsys, cli.main, "plan", "--config", "")
    assert "--model '': is empty" in fails(capsys, cli.main, "sample", "--model", "", "--prompt", "x", "--out", "x.png")
    assert "STUDY.json '': is empty" in fails(capsys, cli.main, "ablate", "")


@pytest.mark.parametrize("args, words", [
    (["--model", "/nowhere/else", "--prompt", "x"], "/nowhere/else"),
    (["--prompt", "x", "-n", "0"], "-n"),
    (["--prompt", "x", "-n", str(10**30)], f"-n {10**30} with 1 prompts: too many images"),
    (["--prompt", "x", "-n", "9" * 4300], "-n 999"),
    (["--prompt", "x", "-n", "9" * 4301], "-n: invalid int value"),
    (["--prompt", "caf\udce9"], "--prompt 'caf\\udce9': is not UTF-8"),
    (["--prompt", "\ud800"], "is not UTF-8"),
    (["--prompt", "x", "--out", "picture.gif"], "must end in .png or .jpg, or be a folder"),
    (["--prompt", "x", "--out", "tests"], "--out tests: the folder is not empty; choose another"),
    (["--prompt", "x", "--height", "20"], "--height 20: must be a multiple of 8, at most 16384"),
    (["--prompt", "x", "--width", "0"], "--width 0: must be"), (["--prompt", "x", "--width", "16392"], "--width 16392"),
    (["--prompt", "x", "--device", "cuda:99"], "--device cuda:99: there is no such GPU here (of "),
    (["--prompt", "x", "--device", "tpu"], "--device tpu: must be cpu, cuda or cuda:N"),
    (["--prompt", "x", "--dtype", "int8"], "--dtype: invalid choice"),
    (["--prompt", "x", "--out", "/nowhere/x.png"], "/nowhere"),
    (["--prompt", "x", "--out", "/proc/x.png"], "--out /proc/x.png: nothing can be written to /proc ("),
    (["--prompts", "/nowhere.txt"], "/nowhere.txt"),
    (["--prompt", "x", "--steps", "0"], "--steps (0) must be at least 1 and at most 1000"),
    (["--prompt", "x", "--steps", "1001"], "--steps (1001)"),
    (["--prompt", "x", "--guidance", "nan"], "--guidance (nan)"),
], ids=lambda v: "" if isinstance(v, str) else ascii(" ".join(v))[:40])
def test_sample(capsys, tiny_teacher, tmp_path, args, words):
    defaults = ["--model", str(tiny_teacher), "--out", str(tmp_path / "x.png")]
    assert words in fails(capsys, cli.main, "sample", *defaults, *args)
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("option", ["--seeds-per-prompt", "--seeds", "--resize", "--seed-offset"])
def test_numbers_of_an_evaluation_that_are_too_large(capsys, tiny_teacher, tmp_path, option):
    args = ["--model", tiny_teacher, "--prompts", "shapes:held_out", "--metrics", "clip", "--images", "2"]
    line = fails(capsys, cli.main, "evaluate", *args, "--out", tmp_path / "r.json", option, 10**30)
    assert option in line and str(10**30) in line


def test_reader_that_is_gone(write_config):
    """As in `... --dry-run | head -1`."""
    reading, writing = os.pipe()
    os.close(reading)
    script = "import sys; from sidfast.train import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", script, "--config", write_config(), "--dry-run"], cwd=ROOT,
                          stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_sample_works(capsys, tiny_teacher, tmp_path):
    from PIL import Image

    out = tmp_path / "grid.png"
    (tmp_path / "p.txt").write_text("a red circle\na blue square\n")
    args = ["sample", "--model", str(tiny_teacher), "--prompts", str(tmp_path / "p.txt"), "--steps", "2", "-n", "3"]
    assert cli.main([*args, "--out", str(out)]) == 0
    assert Image.open(out).size[0] > 2 * 128 and "tokens" not in capsys.readouterr().err
    (tmp_path / "p.txt").write_text("a red circle\n" + "a small green cross " * 12)
    assert cli.main([*args[:-1], "1", "--out", str(out)]) == 0
    assert capsys.readouterr().err == ("sidfast: 1 of 2 prompts is longer than the 24 tokens that the text encoder "
                                       "takes; the rest of the text is cut off\n")


def test_dry_run_prints_the_resolved_configuration(capsys, write_config, tmp_path):
    assert train.main(["--config", str(write_config()), "--out", str(tmp_path / "run"), "--dry-run"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["train"]["batch_size"] == 4 and printed["loss"]["alpha"] == 1.0
    assert not (tmp_path / "run").exists()
