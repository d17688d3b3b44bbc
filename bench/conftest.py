"""`pytest bench/`: benchmarks of the kernels, the UNet and the whole step; gates at the end fail the run.

Small sizes on a CPU, Stable Diffusion 1.5's on a GPU. `--results FILE` keeps the numbers with the hardware named.
"""

import json
from pathlib import Path

import pytest
import torch
from harness import GATES, check_gates, find_machine, free, load_gates, missing, repeated

from sidfast.common.environment import hide_checkout
from sidfast.common.files import write_atomically

_KEY, _RAN, _PARTIAL, _SKIPPED = (pytest.StashKey() for _ in range(4))
# (results; files of which tests ran, files of which not all were asked for, and {file: ids of skipped tests})


def pytest_addoption(parser):
    parser.addoption("--results", metavar="FILE", help="write all numbers to a JSON file")
    parser.addoption("--gates", metavar="FILE", help="gates other than bench/gates.json")


def pytest_configure(config):
    hide_checkout()
    config.stash[_KEY], config.stash[_RAN], config.stash[_SKIPPED] = {}, set(), {}
    config.stash[_PARTIAL] = {Path(arg.split("::")[0]).name for arg in config.args if "::" in arg}


def pytest_deselected(items):
    for item in items:
        item.config.stash[_PARTIAL].add(item.path.name)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if report.skipped:
        item.config.stash[_SKIPPED].setdefault(item.path.name, []).append(item.name)
    elif report.when == "call":
        item.config.stash[_RAN].add(item.path.name)
    return report


@pytest.fixture(scope="session")
def machine():
    return find_machine()


@pytest.fixture
def record(request, machine):
    """record(group, implementation, numbers): for the table at the end, and for the gates. A run that is cut short has
    kept what it measured until then."""

    def keep(group, implementation, numbers):
        results = request.config.stash[_KEY]
        results.setdefault(group, {})[implementation] = numbers
        _write(request.config.getoption("--results"), machine, results)

    return keep


@pytest.fixture
def timed(benchmark, machine, record):
    """timed(group, implementation, step, times=1, least_bytes=0, flop=0): the median time of a step."""

    def measure(group, implementation, step, times=1, least_bytes=0, flop=0):
        free()
        benchmark.group = group
        run = repeated(step, machine, times)
        benchmark.pedantic(run, rounds=10 if machine.gpu else 3, warmup_rounds=2 if machine.gpu else 1)
        numbers = {"ms": benchmark.stats.stats.median / times * 1e3}
        if least_bytes:
            gb_s = least_bytes / numbers["ms"] / 1e6
            numbers |= {"gb_s": gb_s, "share_of_copy": gb_s / machine.copy_gb_s}
        if flop:
            tflop_s = flop / numbers["ms"] / 1e9
            numbers |= {"tflop_s": tflop_s, "share_of_product": tflop_s / machine.product_tflop_s}
        if machine.gpu:
            numbers["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        benchmark.extra_info |= numbers
        record(group, implementation, numbers)

    return measure


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    config = session.config
    results, where = config.stash[_KEY], "cuda" if torch.cuda.is_available() else "cpu"
    gates = load_gates(config.getoption("--gates") or GATES)
    partial = exitstatus or config.getoption("lf", False)                        # (--lf does not tell what it leaves)
    checked = check_gates(results, gates, where)
    lacking = [(gate, names, partial or _may_lack(config, gate["file"], names))
               for gate, names in missing(results, gates, where)]
    config.stash[_KEY] = results, checked, lacking
    if exitstatus == 0 and not all(holds for *_, holds in (*checked, *lacking)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _may_lack(config, file, names):
    """Whether these measurements of a file were not asked for, or are of tests that this machine has to skip."""
    skipped = config.stash[_SKIPPED].get(file, ())
    return file not in config.stash[_RAN] - config.stash[_PARTIAL] or all(
        any(name in test for test in skipped) for name in names)


def pytest_terminal_summary(terminalreporter, config):
    results, checked, lacking = config.stash[_KEY]
    write = terminalreporter.write_line
    for group, rows in results.items():
        write(f"\n{group}")
        for name, numbers in rows.items():
            write(f"  {name:<24}" + "  ".join(f"{k} {v:.4g}" for k, v in numbers.items()))
    write("")
    for gate, value, holds in checked:
        bound = gate.get("ratio", gate.get("share_of_copy"))
        what = f"against {gate['slow']}" if "slow" in gate else "share of the copy bandwidth"
        write(f"{'ok  ' if holds else 'FAIL'} {gate['group']}: {gate['fast']} {what}: {value:.2f}, at least {bound}")
    for gate, names, holds in lacking:
        write(f"{'--  ' if holds else 'FAIL'} {gate['group']}: not measured: {', '.join(names)}")


def _write(path, machine, results):
    if path:
        write_atomically(Path(path), json.dumps(
            {"machine": machine.name, "torch": torch.__version__, "copy_gb_s": machine.copy_gb_s,
             "product_tflop_s": machine.product_tflop_s, "results": results}, indent=1) + "\n")
