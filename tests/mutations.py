"""Put bugs into copies of the checkout, one at a time, and see whether the tests notice: a list is in mutations.json.

    python tests/mutations.py [NAME ...] [--all-tests] [--jobs N]

A mutation replaces a text that occurs once in a file. The tests that it names must fail; `--all-tests` runs the whole
selection of CI instead, up to the first failure. `unchanged` runs the tests of all given mutations (or the selection)
without a bug, and must pass. Exit code 1 if a mutation was not noticed or could not be made.
"""

import argparse
import contextlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_LEFT_BEHIND = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build")
_PORT = re.compile(r"\b(29[6-9]\d\d|30[01]1\d)\b")       # written into tests; 29500, PyTorch's own, is none of these
_PORTS_APART = 1000                                      # of copies that are tested at the same time
_SELECTION = ["-m", "not gpu and not slow", "--ignore", "tests/test_mutations.py"]      # (which misses the text)


def main():
    """Returns the exit code."""
    arguments = _parser().parse_args()
    known = {mutation["name"]: mutation for mutation in json.loads(Path(__file__).with_suffix(".json").read_text())}
    unknown = set(arguments.names) - known.keys() - {"unchanged"}
    if unknown:
        print(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}", file=sys.stderr)
        return 2
    chosen = [known.get(name) or unchanged(known, arguments.names) for name in arguments.names or known]
    slots = queue.SimpleQueue()
    for slot in range(arguments.jobs):
        slots.put(slot)

    def work(mutation):
        slot = slots.get()
        try:
            ok, outcome = attempt(mutation, slot, arguments.all_tests, arguments.timeout)
        finally:
            slots.put(slot)
        print(f"{mutation['name']:<26} {outcome}", flush=True)
        return ok

    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = list(pool.map(work, chosen))
    print(f"{sum(results)} of {len(results)} as they should be")
    return 0 if all(results) else 1


def unchanged(known, names):
    """The mutation that changes nothing, with the tests of the mutations of those names, or of all."""
    others = [known[name] for name in names if name in known] or known.values()
    return {"name": "unchanged", "tests": sorted({test for mutation in others for test in mutation["tests"]})}


def attempt(mutation, slot, all_tests, timeout):
    """(whether the tests did as they should, in words). `slot`: a number that no attempt at the same time has."""
    with tempfile.TemporaryDirectory(prefix=f"mutation-{mutation['name']}-") as folder:
        copy = Path(folder) / "checkout"
        fault = prepare(copy, mutation, slot)
        if fault:
            return False, f"FAULT  {fault}"
        tests = _SELECTION if all_tests else [*mutation["tests"], *_SELECTION]
        code, output = run_tests(copy, tests, timeout)
    changed = "file" in mutation
    if code is None:
        return changed, f"{'noticed' if changed else 'FAULT '}  the tests hang: more than {timeout} s"
    if code == 0:
        return not changed, f"NOT noticed  {count(output)}" if changed else f"passed  {count(output)}"
    first = re.search(r"^(?:FAILED|ERROR) (.*)$", output, re.MULTILINE)
    if not first or code > 2:                            # (no such test, none selected, or pytest itself failed)
        return False, f"FAULT  pytest ended with {code}: {output.strip()[-300:]}"
    return changed, f"{'noticed' if changed else 'FAULT '}  {first[1]}"


def prepare(copy, mutation, slot):
    """Copy the checkout and put the mutation in. Returns what went wrong, or None."""
    shutil.copytree(ROOT, copy, symlinks=True, ignore=lambda folder, names: (
        _LEFT_BEHIND(folder, names) | ({"runs"} if Path(folder) == ROOT else set())))        # (not sidfast/runs)
    (copy / "sidfast" / "kernels").symlink_to(copy / "kernels")          # where an installation has it
    (copy / "import").mkdir()
    (copy / "import" / "sidfast").symlink_to(copy / "sidfast")
    for path in (copy / "tests").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        path.write_text(_PORT.sub(lambda m: str(int(m[0]) - _PORTS_APART * slot), text), encoding="utf-8")
    if "file" in mutation:
        path = copy / mutation["file"]
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if text.count(mutation["old"]) != 1:
            return f"{mutation['file']} has {mutation['old']!r} {text.count(mutation['old'])} times, not once"
        path.write_text(text.replace(mutation["old"], mutation["new"]), encoding="utf-8")
    found = subprocess.run([sys.executable, "-c", "import sidfast.kernels as k; print(k.__file__)"], cwd=copy.parent,
                           env=environment(copy), capture_output=True, text=True)
    if not found.stdout.startswith(str(copy)):
        return f"sidfast is not imported from the copy, but from {found.stdout.strip() or found.stderr[-300:]}"
    return None


def environment(copy):
    """Of the tests: the copy's package before an installed one, folders and caches that no other copy has."""
    (copy.parent / "tmp").mkdir(exist_ok=True)
    return os.environ | {
        "PYTHONPATH": str(copy / "import"), "TMPDIR": str(copy.parent / "tmp"), "COLUMNS": "300",
        "XDG_CACHE_HOME": str(copy.parent / "cache"), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "",
        "MPLCONFIGDIR": os.environ.get("MPLCONFIGDIR") or str(Path.home() / ".cache" / "matplotlib")}


def run_tests(copy, tests, timeout):
    """(pytest's exit code, its output); the code is None if it ran past the time."""
    command = [sys.executable, "-m", "pytest", "-x", "-rfE", "--tb=no", "--durations=0", "-p", "no:cacheprovider",
               *tests]
    process = subprocess.Popen(command, cwd=copy, env=environment(copy), stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        output, _ = process.communicate(timeout=timeout)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        return None, ""
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)       # (what tests have started and left behind, too)
        process.wait()


def count(output):
    """Pytest's last line."""
    return (output.strip().splitlines() or ["nothing was run"])[-1]


def _parser():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutations of mutations.json; all of them by default")
    parser.add_argument("--all-tests", action="store_true", help="the whole selection, not the tests that are named")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="mutations at the same time")
    parser.add_argument("--timeout", type=int, default=3600, metavar="S", help="seconds for the tests of a mutation")
    return parser


if __name__ == "__main__":
    sys.exit(main())
