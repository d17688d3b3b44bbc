"""Shared fixtures: a tiny teacher, a configuration for it, and training in processes of their own."""

import functools
import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from sidfast.common.environment import prepare_environment

prepare_environment()
if "PYTEST_XDIST_WORKER" in os.environ:                  # read as PyTorch loads: the workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.fsync = os.fstat                                      # (no test can cut the power: disks need not be waited for)
ROOT = Path(__file__).parents[1]
_HANDLERS = {signal.SIGTERM: signal.SIG_DFL, signal.SIGUSR1: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
sys.path.append(str(ROOT / "bench"))                     # what benchmarks and tests share


SLOWEST = ("fused", "resume", "studies_runs", "evaluate", "zero", "fit", "measure", "faults", "plan", "export_copies",
           "adam", "observe", "exports", "kernels_group_norm", "synthetic_runs", "evaluate_command", "speed", "capture",
           "single_file", "low_precision", "fuzz", "assets", "measured_inputs", "joined", "summed", "fused_decoder",
           "prompts_change", "demo", "report", "bench_gates", "bad_input", "pairs", "plan_command", "wiring", "stops",
           "study_resumes")


def pytest_configure(config):
    """Before any test is imported. Where the tests are dealt out to other processes, those have one forking process."""
    if config.getoption("numprocesses", None):
        os.environ["TESTS_FORKS"] = str(start_forks()[0])
        return
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"             # before Triton is imported: kernels run in its interpreter
        import interpreter

        interpreter.speed_up()


def pytest_collection_modifyitems(items):
    """The slowest files first, so that no long one is begun last while the other processes have nothing left."""
    order = {f"test_{name}.py": k for k, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_collection_finish():
    gc.freeze()                                          # the libraries need not be looked through ever again


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory):
    """The folder of a tiny, randomly initialised Stable Diffusion."""
    from tiny import write_tiny_teacher

    return write_tiny_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def tiny_config(tiny_teacher):
    """A configuration, as nested dictionaries, that trains the tiny teacher for 20 steps without pictures."""
    return {"model": {"teacher": str(tiny_teacher)}, "data": {"prompts": "shapes:train"},
            "train": {"steps": 20, "batch_size": 4, "micro_batch": 2, "log_every": 1, "save_every": 1000, "samples": 0},
            "optimizer": {"generator": {"lr": 1e-3}, "fake_score": {"lr": 1e-3}}}


@pytest.fixture
def write_config(tmp_path, tiny_config):
    """write_config(**{"section.key": value}) -> the path of a configuration file."""

    def write(name="config.json", **changes):
        values = json.loads(json.dumps(tiny_config))
        for key, value in changes.items():
            *sections, last = key.split(".")
            target = values
            for section in sections:
                target = target.setdefault(section, {})
            target[last] = value
        path = tmp_path / name
        path.write_text(json.dumps(values))
        return path

    return write


@pytest.fixture(autouse=True)
def _signals_as_before():
    """Training in this process ignores signals once it has ended; the next test gets them again, also where a fixture
    of its file has trained."""
    for number, handler in _HANDLERS.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module", autouse=True)
def _no_group_left():
    """Whatever a file's tests join (training in this process, for example) is over with the file."""
    import torch

    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def group(monkeypatch):
    """A process group of this process alone."""
    import torch

    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def known_again():
    """Takes the densities and sources that a test defines out of the registries afterwards."""
    from sidfast.method.densities import DENSITIES
    from sidfast.method.synthetic import SOURCES

    before = dict(DENSITIES), dict(SOURCES)
    yield
    for registry, kept in zip((DENSITIES, SOURCES), before, strict=True):
        registry.clear()
        registry.update(kept)


def environment(port, gpu=False):
    """One thread a process, so that results do not depend on the machine; a port of its own for each test.

    Without Triton's interpreter: training on the CPU uses the references. Without the marks of a parallel test run,
    which pytest-benchmark would take for its own.
    """
    inherited = {name: value for name, value in os.environ.items()
                 if name != "TRITON_INTERPRET" and not name.startswith("PYTEST_XDIST")}
    return inherited | {"OMP_NUM_THREADS": "1", "MASTER_PORT": str(port)} | (
        {} if gpu else {"CUDA_VISIBLE_DEVICES": ""})


def process_alone(monkeypatch):
    """Set the environment of a process that joins nobody, on the CPU."""
    for name, value in environment(free_port()).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_launcher(script, *args, processes=1, port, gpu=False, **more):
    """Start DeepSpeed's launcher, as a user does; `more`: environment variables."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [shutil.which("deepspeed", path=path), "--log_level", "critical", "--num_accelerators", str(processes),
               "--master_port", str(port), script, *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, env=environment(port, gpu) | {"PATH": path} | more,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@functools.cache
def start_forks():
    """Start tests/forks.py, which ends with this process. Its folder, and what keeps both alive."""
    folder = tempfile.TemporaryDirectory(prefix="forks-", ignore_cleanup_errors=True)
    return Path(folder.name), folder, subprocess.Popen(
        [sys.executable, "tests/forks.py", folder.name], cwd=ROOT, stdin=subprocess.PIPE,
        env=environment(0) | {"DS_ACCELERATOR": "cpu"})


def forks():
    """The folder of the forking process that answers: of this process, or of all that the tests are dealt out to."""
    folder = Path(os.environ["TESTS_FORKS"]) if "TESTS_FORKS" in os.environ else start_forks()[0]
    deadline = time.monotonic() + 300
    while not (folder / "socket").exists():
        assert time.monotonic() < deadline, "tests/forks.py does not answer"
        time.sleep(0.02)
    return folder


class Forked:
    """What tests use of a `subprocess.Popen`, of a command that is forked: "train", "cli", or the path of a script."""

    def __init__(self, program, arguments, port, output=None, **more):
        """`output`: a file for standard output, such as a device; `more`: environment variables."""
        folder = forks()
        self._said = [Path(tempfile.mkdtemp(dir=folder)) / name for name in ("output", "errors")]
        for path in self._said:
            path.touch()                                 # (a process killed at once would leave none)
        errors = str(self._said[1])
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(folder / "socket"))
            with connection.makefile("rw") as stream:
                stream.write(json.dumps({"program": program, "arguments": [str(a) for a in arguments],
                                         "output": output or str(self._said[0]), "errors": errors,
                                         "environment": environment(port) | more}) + "\n")
                stream.flush()
                self.pid, self.returncode = int(stream.readline()), None
        self._code = Path(f"{errors}.code")

    @property
    def stderr(self):
        return self._said[1].open()

    def poll(self):
        if self.returncode is None and self._code.exists():
            self.returncode = int(self._code.read_text())
        return self.returncode

    def wait(self, timeout=1800):
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.02)
        return self.returncode

    def communicate(self, timeout=1800):
        self.wait(timeout)
        return tuple(path.read_text() for path in self._said)

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def fork_training(config, out, port, *args):
    """Training as one process, without the seconds that it takes to load PyTorch and DeepSpeed."""
    return Forked("train", ["--config", config, "--out", out, *args], port)


def run_jobs(jobs, folder, processes, port, gpu=False, script="tests/jobs.py"):
    """Run a list of training jobs (see tests/jobs.py), or what another script makes of them: under DeepSpeed's
    launcher, or on the CPU as forked processes."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"jobs-{port}.json"
    file.write_text(json.dumps(jobs))
    if gpu:
        started = [start_launcher(script, file, processes=processes, port=port, gpu=True)]
    else:
        started = [Forked(script, [file], port, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes),
                          LOCAL_SIZE=str(processes), MASTER_ADDR="127.0.0.1") for rank in range(processes)]
    wait_for_all(started)


def wait_for_all(processes, timeout=1800):
    """Until all of them have ended well; if one has not, the others, which may wait for it, are ended."""
    deadline, codes = time.monotonic() + timeout, [None]
    try:
        while None in codes and not any(codes) and time.monotonic() < deadline:
            time.sleep(0.02)
            codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process in processes:
        assert process.wait() == 0, process.stderr.read()[-3000:]


def wait_for_lines(out, count, processes, timeout=300):
    """Until a run's metrics.jsonl has so many lines; none of its processes may end before."""
    deadline, path = time.monotonic() + timeout, out / "metrics.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert all(p.poll() is None for p in processes) and time.monotonic() < deadline
        time.sleep(0.05)


def losses(out):
    """[(step, fake-score loss, generator loss), ...] of a run directory."""
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["fake_score_loss"], row["generator_loss"]) for row in rows]
