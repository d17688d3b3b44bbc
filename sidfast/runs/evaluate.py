"""Evaluations of a run while it trains, and the best export beside the last. First process only.

The parts are those of `sidfast evaluate`, so the numbers are the same numbers.
"""

import hashlib
import json
import math
import re

import torch

from sidfast.accel.precision import tf32
from sidfast.common.errors import UserError
from sidfast.evaluation.evaluate import pipeline_generator
from sidfast.evaluation.metrics import lower_is_better
from sidfast.evaluation.protocol import HELD_OUT, EvaluationOptions, EvaluationSpec
from sidfast.evaluation.rows import MemoryRows, collect
from sidfast.publishing.export import half_type, networks_of, read_distillation, recover_export, write_export
from sidfast.runs.identity import describe_distillation

_BATCH_PIXELS = 250 * 64 * 64
_OPTION = re.compile(r"--([a-z][a-z-]*)")


def check_measures(config, teacher, memo):
    """Raise UserError, naming keys, for an evaluation that could not be made. What it needs is loaded, and kept in
    `memo` for the Evaluator."""
    measuring = _protocol(config, memo)
    if measuring:
        size = teacher.image_size(config.model.resolution)
        _in_keys(lambda: measuring[0].sized(lambda *_: torch.zeros(1, 3, *size))(0, 1))


class Evaluator:
    """Measures generators through their pipelines, and keeps an export of the best one as RUN/best.

    The record of the best stands inside its export, so that the two are never of different generators.
    """

    def __init__(self, config, run, size, device, memo):
        """`run`: the RunDirectory; `size`: (height, width) of the images in pixels; `memo`: a dictionary that runs one
        after the other share, of what is the same for all of them (networks, reference, the teacher's numbers)."""
        self.config, self.run, self.size, self.device, self.memo = config, run, size, device, memo
        self.protocol, self.best_by = _protocol(config, memo)
        recover_export(run.out / "best")

    @tf32(False)                                         # as `sidfast evaluate` does it
    def measure(self, name, pipe, step, again=False, **options):
        """Measure a pipeline, called with `options`, and keep the result under `name` in evaluation.json.

        `step` None: not of this run's generator, so not in its curves. Unless `again`, a result that is there is taken.
        Returns {"images", "step", metric..., "intervals": {metric: [low, high]}, "protocol": hash}. Raises UserError
        (NonFiniteImage for a broken generator) for images that cannot be measured.
        """
        protocol, judge = self.protocol, self.protocol.judge.to(self.device)
        try:
            reference = self._once("reference", protocol.measure_reference)
            identity = json.dumps(protocol.describe(reference), sort_keys=True)
            identity = hashlib.sha256(identity.encode()).hexdigest()
            known = self.run.evaluation(name)
            if known and known.get("protocol") == identity and not again:
                return known

            def compute():
                return protocol.compute(self._rows(name, pipe, options), reference)

            of_teacher = not step                        # the teacher's own network, whatever the run makes of it
            values, intervals = self._once(name, self.config.model.model_dump(), self.config.noise.t_init, options,
                                           compute) if of_teacher else compute()
        finally:
            judge.to("cpu")
        result = {"images": len(protocol.prompts), "step": step, **values, "intervals": intervals, "protocol": identity}
        self.run.evaluation(name, result)
        if step is not None:
            self.run.log(step, {f"evaluation/{key}": value for key, value in values.items()})
        return result

    def keep_best(self, result, pipe, step):
        """Export `pipe`, whose numbers are `result`, as RUN/best if no generator before it was better."""
        folder, value = self.run.out / "best", result[self.best_by]
        record = read_distillation(folder).get("evaluation", {})
        before = record.get(self.best_by) if record.get("protocol") == result["protocol"] else None
        better = before is None or (value < before if lower_is_better(self.best_by) else value > before)
        if math.isfinite(value) and better:
            about = describe_distillation(self.config, step, self.run.inputs)
            about |= {"best_by": self.best_by, "evaluation": result}
            with self.run.attempt("the best export"):
                write_export(pipe, folder, half_type(*networks_of(pipe)), about)

    def _once(self, *what):
        """The result of a function, the last argument, kept under the other arguments and what is measured."""
        *key, make = what
        key = json.dumps([*key, self.config.evaluation.model_dump(), self.config.data.prompts, str(self.device)])
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

    def _rows(self, name, pipe, options):
        height, width = self.size
        generate = pipeline_generator(pipe, height=height, width=width, **options)
        prompts, rows = self.protocol.prompts, MemoryRows()
        make = self.protocol.sized(lambda start, stop: generate(prompts[start:stop], range(start, stop)))
        at_once = self.config.evaluation.batch_size or max(1, _BATCH_PIXELS // (height * width))
        collect(make, prompts, self.protocol.judge.rows, rows, at_once, f"evaluate {name}")
        return rows


def _protocol(config, memo):
    """(EvaluationSpec on the CPU, the metric that tells the best) of a run's evaluations, or None if it wants none;
    kept in `memo`."""
    key = json.dumps(["protocol", config.evaluation.model_dump(), config.data.prompts])
    if key not in memo:
        memo[key] = _open(config, torch.device("cpu"))
    return memo[key]


def _open(config, device):
    section = config.evaluation
    if not section.images:
        return None
    options = {name: getattr(section, name) for name in (
        "prompts_column", "reference", "images", "seeds_per_prompt", "metrics", "features", "clip", "resize", "filter",
        "assets")}
    protocol = _in_keys(
        lambda: EvaluationSpec(EvaluationOptions(prompts=section.prompts or HELD_OUT, **options), device))
    names = protocol.names()
    if section.best is not None and section.best not in names:
        raise UserError(f"evaluation.best: {section.best} is not measured; these are: {', '.join(names)}")
    usual = [name for start in ("fid", "kid", "clip_score", "accuracy") for name in names if name.startswith(start)]
    return protocol, section.best or [*usual, *names][0]


def _in_keys(action):
    """The result of `action()`; its UserErrors call the options by the keys of the configuration."""
    try:
        return action()
    except UserError as error:
        raise UserError(_OPTION.sub(lambda m: f"evaluation.{m[1].replace('-', '_')}", str(error))) from None
