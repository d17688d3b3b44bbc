"""`sidfast ablate`: do what is left of a study, then write its results, table, plots and report."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from sidfast.common.environment import omp_threads
from sidfast.common.errors import UserError
from sidfast.common.extras import need
from sidfast.common.files import check_folder, sweep, write_atomically
from sidfast.evaluation.charts import encode
from sidfast.studies.plots import plots
from sidfast.studies.record import check_record, is_final, read_record
from sidfast.studies.report import page
from sidfast.studies.results import collect, costs
from sidfast.studies.study import read_study
from sidfast.studies.table import markdown

_FOLDERS = {"runs", "teacher", "logs", "cache"}          # all that is there before the first results


def ablate(path, out, jobs=1, imports=()):
    """Run a study, or go on with it.

    `jobs`: runs at once on each GPU, or on the CPU; `imports`: modules that its processes import first. Results come
    to `out`, also those of a study that is not finished. Returns whether it is. Raises UserError for whatever can be
    found at fault before training begins.
    """
    for library, extra in (("scipy", "eval"), ("jinja2", "report"), ("matplotlib", "report")):
        need(library, extra, "sidfast ablate")
    study, out = read_study(path), Path(out or Path("runs") / "ablations" / Path(path).stem)
    if not 1 <= jobs <= 1000:
        raise UserError(f"--jobs must be 1 to 1000, not {jobs}")
    check_folder(out)
    _check_ours(out)
    for run in study.runs:
        check_record(out, study, run)
    left = _left(study, out)
    if left:
        _check_inputs(study, path)
        out.mkdir(parents=True, exist_ok=True)
        _work(study, path, out, jobs, len(left), imports)
    write_results(study, out)
    left = _left(study, out)
    for item in left:
        record = read_record(out, item)
        why = f"failed: {record['message']}" if record else "not finished (see the end of logs/); run this again"
        print(f"sidfast: {item.title}: {why}", file=sys.stderr)
    return not left


def write_results(study, out):
    """Everything that a study shows, from what its runs left behind. results.json is the same however they came about;
    what they cost stands in costs.json."""
    results, cost = collect(study, out), costs(study, out)
    sweep(out)
    write_atomically(out / "results.json", json.dumps(results, indent=1) + "\n")
    write_atomically(out / "costs.json", json.dumps(cost, indent=1) + "\n")
    write_atomically(out / "table.md", markdown(results, cost))
    figures = plots(results)
    for name, figure in figures.items():
        for kind in ("png", "svg"):
            write_atomically(out / f"{name}.{kind}", encode(figure, kind))
    write_atomically(out / "report.html", page(study, out, results, cost, figures))


def _check_ours(out):
    """UserError for a folder that holds anything, but nothing by which a study is known."""
    names = [path.name for path in out.iterdir()] if out.is_dir() else []
    begun = (out / "logs" / "worker-0.log").is_file() or (out / "costs.json").is_file()
    if not begun and set(names) - _FOLDERS:
        raise UserError(f"--out {out}: the folder is not empty and holds no study; choose another")


def _left(study, out):
    return [item for item in study.items if not is_final(read_record(out, item))]


def _check_inputs(study, path):
    """What a run would otherwise stumble over after hours, or one after the other."""
    from sidfast.data.prompts import open_lines
    from sidfast.teachers.folders import is_hub_id
    from sidfast.training.preflight import check_runs

    measures = study.file.evaluation
    features = measures.features.partition(":")[2] if measures.features else None
    for name, place in (("coco", measures.coco), ("prompts", measures.prompts), ("reference", measures.reference),
                        ("features", features), ("clip", measures.clip),
                        ("assets", measures.assets if study.of_shapes else None)):
        if place is not None and not Path(place).exists() and not (name in ("features", "clip") and is_hub_id(place)):
            raise UserError(f"{path}: evaluation.{name}: {place} does not exist")
    if measures.prompts is not None:
        open_lines(measures.prompts, measures.prompts_column, f"{path}: evaluation.prompts")
    runs = study.runs[:len(study.file.variants)]         # (of one seed: the others differ in nothing else)
    for run in runs:
        if run.config.train.micro_batch == "auto":
            raise UserError(f"{path}: variants.{run.variant}: train.micro_batch must be a number here, so that runs "
                            "can be compared")
    check_runs({f"{path}: variants.{run.variant}": run.config for run in runs})


def _work(study, path, out, jobs, left, imports):
    """Start workers, tell of every run that ends, wait for all of them."""
    gpus = _gpus()
    devices = [gpu for gpu in gpus or [None] for _ in range(jobs)]
    threads = omp_threads() or max(1, os.cpu_count() // len(devices))
    (out / "logs").mkdir(exist_ok=True)
    workers = [_start([path, out, min(jobs, left), threads, *imports], gpu, out / "logs" / f"worker-{k}.log")
               for k, gpu in enumerate(devices[:left])]
    seen = {item.folder for item in study.items if is_final(read_record(out, item))}
    try:
        busy = True
        while busy:
            busy = any(worker.poll() is None for worker in workers)
            _tell(study, out, seen)
            time.sleep(0.5 if busy else 0)
    finally:
        for worker in workers:
            worker.stdin.close()                         # ends a worker that is still there
            worker.wait()
    for k, worker in enumerate(workers):
        if worker.returncode:
            log = out / "logs" / f"worker-{k}.log"
            print(f"sidfast: worker {k} ended with exit code {worker.returncode}; see {log}", file=sys.stderr)


def _start(arguments, gpu, log):
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0",
                                "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    environment["OMP_NUM_THREADS"] = str(arguments[3])
    with open(log, "ab") as file:
        return subprocess.Popen([sys.executable, "-m", "sidfast.studies.worker", *map(str, arguments)],
                                env=environment, stdin=subprocess.PIPE, stdout=file, stderr=file)


def _gpus():
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else [str(i) for i in range(count)]


def _tell(study, out, seen):
    for item in study.items:
        record = None if item.folder in seen else read_record(out, item)
        if is_final(record):
            seen.add(item.folder)
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in record["metrics"].items()
                                if value is not None and not name.startswith("accuracy_"))
            print(f"sidfast: {len(seen)} of {len(study.items)}: {item.title}: {record['status']}"
                  f"{', ' + numbers if numbers else ''}", file=sys.stderr, flush=True)
