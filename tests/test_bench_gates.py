"""The benchmarks' gates: they hold for what they were set for, and a slowed kernel makes its gate fail the run."""

import json
import os
import subprocess
import sys

import peak
import plots
import pytest
import pytest.__main__
from conftest import ROOT, Forked
from harness import check_gates, load_gates, missing

GATE = {"where": "cpu", "file": "test_sum.py", "group": "sum", "fast": "fused", "slow": ["eager", "compiled"],
        "ratio": 1.5}
SHARE = {"where": "cpu", "file": "test_sum.py", "group": "sum", "fast": "fused", "share_of_copy": 0.7}
BENCH = '''
import time
import pytest, torch

@pytest.mark.parametrize("implementation", ("fused", "eager"))
def test_sum(timed, machine, implementation):
    BODY
    x = torch.ones(1000)

    def step():
        x.sum()
        time.sleep({"fused": FUSED, "eager": 0.02}[implementation])

    timed("sum", implementation, step, least_bytes=4000)
'''


@pytest.mark.parametrize("eager, compiled, holds", [(3, 2, True), (2, 3, True), (3, 1.4, False), (1.4, 3, False)])
def test_a_ratio_is_against_the_best_of_the_others(eager, compiled, holds):
    results = {"sum": {"fused": {"ms": 1}, "eager": {"ms": eager}, "compiled": {"ms": compiled}}}
    assert check_gates(results, [GATE], "cpu") == [(GATE, min(eager, compiled), holds)]


def test_a_share_of_the_copy_bandwidth():
    results = {"sum": {"fused": {"ms": 1, "share_of_copy": 0.69}}}
    assert check_gates(results, [SHARE], "cpu") == [(SHARE, 0.69, False)]


@pytest.mark.parametrize("results", [{}, {"sum": {"fused": {"ms": 1}}}, {"sum": {"eager": {"ms": 1}}}], ids=str)
def test_what_was_not_measured_is_not_judged(results):
    assert check_gates(results, [GATE], "cpu") == []
    assert check_gates({"sum": {"fused": {"ms": 1}, "eager": {"ms": 1}}}, [GATE], "cuda") == []


@pytest.mark.parametrize("group, names", [
    ({}, ["fused", "eager", "compiled"]), ({"fused": {}, "eager": {}}, ["compiled"]),
    ({"fused": {}, "eager": {}, "compiled": {}}, [])], ids=str)
def test_what_was_not_measured_is_named(group, names):
    assert missing({"sum": group}, [GATE], "cpu") == ([(GATE, names)] if names else [])
    assert missing({"sum": {"fused": {}}}, [SHARE], "cpu") == missing({}, [GATE], "cuda") == []


def test_the_gates_kept_are_well_formed():
    gates = load_gates()
    assert len(gates) >= 8
    for gate in gates:                                   # (names are tied to measurements when those are made)
        assert gate["where"] in ("cuda", "cpu") and gate["group"] and gate["fast"]
        assert (ROOT / "bench" / gate["file"]).is_file()
        assert ("share_of_copy" in gate) != ("slow" in gate and gate["ratio"] > 0)


def run_bench(folder, gate, *arguments, seconds=0.001, body="", more=""):
    """(exit code, output) of BENCH with a gate; `body` begins its test, `more` follows it."""
    (folder / "test_sum.py").write_text(BENCH.replace("FUSED", str(seconds)).replace("BODY", body) + more)
    (folder / "conftest.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT / 'bench')!r})\n" + (ROOT / "bench" / "conftest.py").read_text())
    (folder / "gates.json").write_text(json.dumps([gate]))
    what = [] if any("::" in argument for argument in arguments) else [folder]
    arguments = [str(folder / argument) if "::" in argument else argument for argument in arguments]
    done = Forked(pytest.__main__.__file__, [*what, "-o", f"cache_dir={folder / 'cache'}", "--gates",
                                             folder / "gates.json", "--results", folder / "results.json",
                                             *arguments], 0)
    output, errors = done.communicate()
    return done.returncode, output + errors


@pytest.mark.parametrize("seconds, code", [(0.001, 0), (0.06, 1)], ids=("fast", "slowed"))
def test_a_slowed_kernel_fails_the_run(tmp_path, seconds, code):
    got, output = run_bench(tmp_path, GATE | {"slow": ["eager"]}, seconds=seconds)
    assert got == code and ("ok   sum" if code == 0 else "FAIL sum: fused against ['eager']") in output, output[-2000:]
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept["machine"] == "CPU" and kept["results"]["sum"]["eager"]["ms"] > 19


@pytest.mark.parametrize("arguments, code", [
    ((), 1), (("-k", "fused or eager"), 1), (("-k", "fused"), 0), (("--lf",), 0), (("test_sum.py::test_sum",), 0)],
    ids=("whole", "all selected", "selected", "last failed", "named"))
def test_a_gate_without_its_measurement_fails_a_whole_run(tmp_path, arguments, code):
    """A name with a slip in it would be no gate any more."""
    got, output = run_bench(tmp_path, GATE | {"group": "smu"}, *arguments)
    assert got == code, output[-2000:]
    assert f"{'FAIL' if code else '--  '} smu: not measured: fused, eager, compiled" in output


@pytest.mark.parametrize("slow, code", [(["eager", "other"], 0), (["eager", "others"], 1)], ids=str)
def test_a_gate_may_lack_what_was_skipped(tmp_path, slow, code):
    """On a machine that cannot run it, and nothing else."""
    skipping = '\n\n@pytest.mark.parametrize("name", ["other"])\ndef test_skipped(name):\n    pytest.skip("not here")\n'
    got, output = run_bench(tmp_path, GATE | {"slow": slow}, more=skipping)
    assert got == code and f"{'FAIL' if code else '--  '} sum: not measured: {slow[1]}" in output, output[-2000:]


@pytest.mark.parametrize("mark, code", [("fail", 1), ("skip", 0)])
def test_a_run_that_fails_or_measures_nothing_names_what_is_missing(tmp_path, mark, code):
    got, output = run_bench(tmp_path, GATE, body=f"pytest.{mark}('')")
    assert got == code and "--   sum: not measured: fused, eager, compiled" in output, output[-2000:]


@pytest.mark.gpu
def test_a_slowed_kernel_of_ours_fails_its_gate(tmp_path):
    """GEGLU's, launched twelve times over, against the gate that is kept for it."""
    (tmp_path / "slowed.py").write_text(
        "from sidfast.kernels import geglu\n"
        "usual = geglu.geglu_forward\n"
        "geglu.geglu_forward = lambda x: [usual(x) for _ in range(12)][0]\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    for plugin, code in (([], 0), (["-p", "slowed"], 1)):
        done = subprocess.run([sys.executable, "-m", "pytest", *plugin, "bench/test_kernels.py", "-k",
                               "geglu and backward"], cwd=ROOT, env=os.environ | {"PYTHONPATH": path},
                              capture_output=True, text=True)
        assert done.returncode == code, done.stdout[-2000:] + done.stderr[-2000:]
        assert f"{'FAIL' if code else 'ok  '} geglu [65536, 2560], forward and backward" in done.stdout


def test_pictures(tmp_path):
    """Each picture is drawn from a file that has its numbers, and only then."""
    step = {f"fused, micro-batch {m}": {"images_per_s": 20 + m, "ms": 1} for m in (4, 8, 16)} | {
        "plain fp16": {"images_per_s": 14.2, "ms": 1}}
    results = {"training step, ms an image": step,
               "UNet, ms by kind": {"fused": {"convolution": 30, "copies": 1}, "eager": {"attention": 25, "copies": 9}},
               "geglu, forward": {"fused": {"ms": 1, "share_of_copy": 0.9}, "eager": {"ms": 3, "share_of_copy": 0.3}}}
    for number, part in enumerate(({}, results)):
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps({"machine": "a GPU", "torch": "2.11", "results": part}))
        plots.main([str(file), "--out", str(tmp_path / str(number))])
    assert not list((tmp_path / "0").iterdir())
    assert {p.name for p in (tmp_path / "1").iterdir()} == {"time-by-kind.png", "micro-batch.png", "bandwidth.png"}


def test_what_is_live_at_the_peak():
    def frames(*names):
        return [{"filename": f"/x/{name}.py", "line": 7, "name": "f"} for name in names]

    def alloc(place, size, *names):
        return {"action": "alloc", "addr": place, "size": size, "frames": frames(*names)}

    ours = "sidfast/accel/unet"
    trace = [alloc(1, 10, "torch/nn", ours), alloc(2, 50, "torch/nn"), {"action": "free_completed", "addr": 2},
             alloc(2, 45, ours), alloc(3, 9, "other"), {"action": "free_requested", "addr": 2},
             {"action": "free_completed", "addr": 2}, alloc(4, 20, "deepspeed/engine", ours)]
    most, sizes = peak.live_at_peak(trace)
    assert most == 64 and sizes == {"accel/unet.py:7 f": 55, "elsewhere": 9}
