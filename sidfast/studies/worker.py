"""One process that takes a study's runs one after the other: `python -m sidfast.studies.worker STUDY OUT JOBS THREADS
[MODULE ...]`.

Teacher, reference features, the evaluation of teacher and start, and compiled kernels are made once for all of them.
The process ends with its parent, whose end it sees at the end of its standard input.
"""

import copy
import gc
import json
import os
import shutil
import sys
import threading
import time
import traceback
from pathlib import Path

from sidfast.common.environment import choose_accelerator, prepare_environment
from sidfast.common.errors import UserError, one_line, tell, unfailing_streams
from sidfast.common.files import remove, replacing, write_atomically
from sidfast.common.plugins import import_modules
from sidfast.runs.lock import NAME as LOCK
from sidfast.runs.lock import claimed

_SIDE = 192                                              # pixels, of an image in the report
_PATIENCE = 10                                           # seconds to wait for a lock whose holder may be ending


def main(argv=None):
    """Work on a study until nothing is left that is not another process's; argv: STUDY, OUT, JOBS, THREADS,
    and modules to import first (`--import`).

    JOBS: processes that share the device; THREADS: of PyTorch on the CPU. Returns the exit code: 0, or 2 for a file
    that is not a study or a folder of another study.
    """
    prepare_environment()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with unfailing_streams():
        try:
            _work(*(argv or sys.argv[1:]))
        except UserError as error:
            tell(one_line(error))
            return 2
    return 0


def _work(path, out, jobs, threads, *modules):
    import torch

    choose_accelerator()
    from sidfast.studies.study import read_study
    from sidfast.training.launch import join

    imports, study, device = import_modules(modules), read_study(path), join()
    torch.set_num_threads(int(threads))                  # the same however many runs are left: so are the results
    Worker(study, Path(out), int(jobs), device, imports).work()
    torch.distributed.destroy_process_group()


def _end_with_parent():
    os.read(0, 1)                                        # (waiting in sys.stdin would hold up the interpreter's end)
    os._exit(1)


class Worker:
    """Does what is left of a study, on one device."""

    def __init__(self, study, out, jobs, device, imports=None):
        """`jobs`: processes that share the device, for the cost; `imports`: of `import_modules`."""
        self.imports = imports
        self.study, self.out, self.jobs, self.device = study, out, jobs, device
        self.memo, self.teacher, self.stopped = {}, None, None

    def work(self):
        """Everything that is neither finished nor another process's: the teacher's points, the runs."""
        from sidfast.studies.record import check_record, is_final, read_record, reserved

        waiting, tried, deadline = self.study.items, set(), time.monotonic() + _PATIENCE
        while waiting:
            busy = []
            for run in waiting:
                with reserved(self.out, run) as mine:
                    if not mine:
                        busy.append(run)
                    elif run.folder not in tried and not is_final(read_record(self.out, run)):
                        tried.add(run.folder)
                        if run in self.study.teacher:
                            self._measure_teacher(run)
                        else:
                            check_record(self.out, self.study, run)      # (another study may have begun since)
                            self._run(run)
                        deadline = time.monotonic() + _PATIENCE
            if time.monotonic() > deadline:
                return                                   # others are at work on what is left
            waiting = busy
            if waiting:
                time.sleep(0.5)

    def _measure_teacher(self, point):
        """The record of the teacher at one scale."""
        from sidfast.evaluation.command import Request, evaluate_model
        from sidfast.studies.record import write_outcome

        study, measures, out = self.study, self.study.file.evaluation, self.out / point.folder / "evaluated.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            evaluate_model(Request(
                model=study.runs[0].config.model.teacher, out=out, seeds=len(study.file.seeds), steps=50,
                guidance=point.guidance, tf32=True, prompts="shapes:held_out", images=measures.images,
                batch_size=measures.batch_size, assets=measures.assets), self.device)
        except UserError as error:
            write_outcome(self.out, point, "failed", str(error))
        else:
            result = json.loads(out.read_text())
            write_outcome(self.out, point, "done", metrics=result["metrics"], repeats=[
                repeat["metrics"] for repeat in result.get("repeats", [result])])

    def _run(self, run):
        """One run, and its record, whatever comes of it."""
        from sidfast.common.errors import Diverged, NonFiniteImage, UserError
        from sidfast.common.records import read_metrics
        from sidfast.studies.record import write_record

        tell(run.title)
        started, metrics, status, message = time.perf_counter(), None, "done", None
        try:
            metrics = self._train(run)
        except (Diverged, NonFiniteImage) as error:
            status, message = "diverged", str(error)
        except UserError as error:
            status, message = "failed", str(error)
        except Exception as error:                       # out of memory, a full disk: the other runs may do
            traceback.print_exc()
            status, message = "failed", f"{type(error).__name__}: {error}".splitlines()[0]
        folder = self.out / run.folder
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lines = read_metrics(folder)
        except UserError as error:
            lines, status, message = [], "failed", str(error)
        if status == "done":
            _strip(folder, self.study, self.device)
        write_record(self.out, self.study, run, status, message, metrics, _curve(lines, run.config, metrics))
        self._write_cost(run, lines, time.perf_counter() - started)
        if status != "failed":
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        if self.stopped:                                 # by a signal as the run was ending: before the next one
            sys.exit(1)
        gc.collect()
        if self.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _train(self, run):
        """Train, or go on training; the final metrics."""
        from sidfast.common.records import read_metrics
        from sidfast.monitoring.shutdown import Stop
        from sidfast.runs.directory import is_unused
        from sidfast.runs.identity import check_inputs
        from sidfast.studies.record import COST, RESULT, has_other_config
        from sidfast.teachers.fingerprint import describe_teacher
        from sidfast.teachers.load import load_teacher
        from sidfast.training.launch import launch
        from sidfast.training.preflight import check_config, preflight

        folder, stop = self.out / run.folder, Stop()
        prompts = check_config(run.config, 1)
        with claimed(folder, first=True):
            if is_unused(folder, (RESULT, COST)) or has_other_config(self.out, run):
                _clear(folder)                           # failed at once, or with a setting that was mended since
            if self.teacher is None:
                self.teacher = load_teacher(run.config.model.teacher, **run.config.model.loading)
            for other in self.study.runs:                # (a table of two teachers' students would not say so)
                check_inputs(self.out / other.folder, describe_teacher(self.teacher))
            plan = preflight(run.config, folder, f"variants.{run.variant}", prompts,
                             teacher=copy.deepcopy(self.teacher), memo=self.memo, imports=self.imports)
            try:
                result = launch(plan, self.device, stop)
            finally:
                self.stopped = stop.asked
        if max(line["step"] for line in read_metrics(folder)) < run.config.train.total_steps:
            sys.exit(1)                                  # stopped by a signal: the next call goes on from here
        return result if self.study.of_shapes else self._evaluate(folder)

    def _evaluate(self, folder):
        """The metrics of a run's export by `sidfast evaluate`."""
        from sidfast.evaluation.command import Request, coco_options, evaluate_model

        options, measures = self.study.file.evaluation.options, self.study.file.evaluation
        if measures.coco:
            options |= coco_options(measures.coco, options)
        out = folder / "evaluated.json"
        evaluate_model(Request(str(folder), out, cache=self.out / "cache", **options), self.device)
        return json.loads(out.read_text())["metrics"]

    def _write_cost(self, run, lines, wall):
        """What the run took, of which time that does not repeat itself is no part of the results."""
        import torch

        from sidfast.studies.record import COST

        gpu = self.device.type == "cuda"
        cost = {"training_s": round(_training_seconds(lines), 3), "wall_s": round(wall, 3),
                "between_steps_s": _seconds_between_steps(lines), "runs_at_once": self.jobs,
                "device": torch.cuda.get_device_name(self.device) if gpu else "CPU",
                "peak_gib": max((peak for line in lines if (peak := line.get("peak_gib")) is not None), default=None)}
        write_atomically(self.out / run.folder / COST, json.dumps(cost, indent=1) + "\n")


def _clear(folder):
    """Empty a run's folder, whose lock we hold."""
    for path in folder.iterdir():
        if path.name != LOCK:
            remove(path)


def _training_seconds(lines):
    """Of the updates alone, those before an interruption included: from the speed that was logged for each interval."""
    seconds, images = 0.0, 0
    for line in lines:
        if line.get("images_per_s"):
            now = line.get("images") or images
            seconds, images = seconds + (now - images) / line["images_per_s"], now
    return seconds


def _seconds_between_steps(lines):
    """What was done between updates, along the run: {phase: seconds}; start and end of the run are no part of it.

    Steps that an interruption left without a line count as those after it.
    """
    seconds, step = dict.fromkeys(("checkpoint", "sampling", "evaluation"), 0.0), 0
    for line in lines:
        if "images_per_s" in line:
            for phase in seconds:
                seconds[phase] += (line["step"] - step) * (line.get(f"seconds/{phase}") or 0.0)
            step = line["step"]
    return {phase: round(spent, 3) for phase, spent in seconds.items()}


def _curve(lines, config, metrics):
    """[(images, {metric: value}), ...] of the evaluations along a run, the last one at its end."""
    curve, prefix = {}, "evaluation/"
    for line in lines:
        values = {key.removeprefix(prefix): value for key, value in line.items() if key.startswith(prefix)}
        if values:
            curve[line["step"] * config.train.batch_size] = values
    if metrics:
        curve[config.train.total_steps * config.train.batch_size] = metrics
    return sorted(curve.items())


def _strip(folder, study, device):
    """The same prompts with the same noise for every run: images of the export, side by side in one picture, at most
    _SIDE pixels each."""
    import torch
    from PIL import Image
    from torchvision.transforms.functional import resize

    from sidfast.evaluation.evaluate import pipeline_generator
    from sidfast.publishing.load import load_pipeline
    from sidfast.studies.record import STRIP

    pipe, _ = load_pipeline(folder, device)
    images = []
    for seed, prompt in enumerate(sample_prompts(study)):
        image = pipeline_generator(pipe)([prompt], [seed]).float().cpu()
        images.append(resize(image, _SIDE, antialias=True).clamp(0, 1) if min(image.shape[-2:]) > _SIDE else image)
    pixels = (torch.cat(images).movedim(0, 2).flatten(2) * 255).round().byte()       # [3, H, images * W]
    with replacing(folder / STRIP) as file:
        Image.fromarray(pixels.movedim(0, 2).numpy()).save(file, format="PNG")


def sample_prompts(study):
    """The prompts of the report's images, no others than those of the evaluation."""
    from sidfast.data.prompts import read_prompts
    from sidfast.evaluation.coco import prepare_coco
    from sidfast.evaluation.evaluate import held_out_captions

    measures = study.file.evaluation
    if study.of_shapes:
        return held_out_captions(measures.samples)
    return read_prompts(measures.prompts or prepare_coco(measures.coco)[0], measures.prompts_column)[:measures.samples]


if __name__ == "__main__":
    sys.exit(main())
