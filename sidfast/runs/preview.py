"""What a run shows of itself: sample grids, exports, and measures. First process only."""

import copy
import json
import sys
import threading

import torch

from sidfast.common.errors import one_line
from sidfast.data.prompts import open_prompts
from sidfast.evaluation.metrics import title
from sidfast.evaluation.report import write_report
from sidfast.publishing.card import write_card
from sidfast.publishing.export import half_type, networks_of, read_distillation, write_export
from sidfast.publishing.grid import image_grid
from sidfast.runs.evaluate import Evaluator
from sidfast.runs.identity import describe_distillation
from sidfast.teachers.fit import TEACHER_STEPS


class Preview:
    """Looks at the teacher and at the averaged generator through the pipelines that users have, in fp32."""

    def __init__(self, config, teacher, run, memo):
        """`memo`: a dictionary of what does not change from run to run, shared by runs with one teacher."""
        self.memo = memo
        self.config, self.teacher, self.run = config, teacher, run
        source = config.data.prompts
        held_out = "shapes:held_out" if source.startswith("shapes:") else source
        prompts = open_prompts(held_out, 1, config.data.prompts_column)
        self.prompts = [prompts[n] for n in range(config.train.samples)]
        self._rows = {}
        self.size = teacher.image_size(config.model.resolution)
        self._device = teacher.device
        self._evaluator = Evaluator(config, run, self.size, self._device, memo) if config.evaluation.images else None
        half = half_type(*teacher.frozen.values())
        halves = {name: torch.nn.Module.to(copy.deepcopy(module), "cpu", half)
                  for name, module in teacher.frozen.items()}
        self._exported = teacher.replace(**halves)       # so that exports leave the GPU alone
        self._thread = self._error = None
        self._told = False                               # of an export in bfloat16

    def begin(self, step):
        """Everything that shows the teacher, before training casts it to its own type."""
        teacher = {"guidance_scale": self.config.guidance.kappa4, "num_inference_steps": TEACHER_STEPS}
        if self.prompts:
            name = f"teacher, {TEACHER_STEPS} steps, guidance {self.config.guidance.kappa4:g}"
            self._rows = {
                name: self._once("images", name, lambda: self._images(self.teacher.pipeline(), **teacher)),
                "student at start, 1 step": self._once("images", self.config.noise.t_init,
                                                       lambda: self._images(self._pipeline(self.teacher.network)))}
        if step == 0:
            self.sample(0, self.teacher.network)
        self.evaluate("start", self.teacher.network, 0)
        if self._evaluator and self.config.evaluation.teacher:
            self._evaluator.measure("teacher", self.teacher.pipeline(), None, **teacher)

    def student(self, weights):
        """A network of the teacher's architecture with the weights {name: fp32}, on the teacher's device."""
        return self.teacher.student(weights, self.config.model.resolution).to(self._device)

    def sample(self, step, network):
        """Save a grid: the teacher in 50 steps, the student at the start of the run, the student now."""
        if self.prompts:
            now = {f"student after {step} updates, 1 step": self._images(self._pipeline(network))}
            self.run.sample(step, image_grid(self._rows | now, self.prompts))

    def export(self, weights, folder, step):
        """Begin to write the one-step pipeline of the weights {name: fp32, on the CPU}, once the one before is written;
        a thread does it. A failure of the disk is told of, anything else that went wrong is raised by `wait`."""
        self.wait()
        self._thread = threading.Thread(target=self._export, args=(weights, folder, step))
        self._thread.start()

    def wait(self):
        """Wait until no export is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    def end(self, weights, folder, step):
        """The export of the last step, if a run that was killed has not written it yet; returns once it is there."""
        self.wait()
        if read_distillation(folder) != self._distillation(step):
            self.export(weights, folder, step)
            self.wait()

    def _distillation(self, step):
        return describe_distillation(self.config, step, self.run.inputs)

    def _export(self, weights, folder, step):
        try:
            with self.run.attempt("the export"):
                network = self.teacher.student(weights, self.config.model.resolution)
                pipe = self._exported.one_step_pipeline(network, self.config.noise.t_init)
                write_export(pipe, folder, self._half_type(pipe), self._distillation(step))
        except Exception as error:                       # raised where training can see it
            self._error = error

    def _half_type(self, pipe):
        """The type of an export, told of if it is not the usual one."""
        half = half_type(*networks_of(pipe))
        if half != torch.float16 and not self._told:
            self._told = True
            print("sidfast: a weight is beyond float16's range (65504), so the export is in bfloat16", file=sys.stderr,
                  flush=True)
        return half

    def finish(self):
        """The model cards of the exports, and the report, once everything else is there. The run is complete without
        them: one that cannot be made is a line on standard error."""
        for name in ("export", "best"):
            self._attempt(f"the model card of {name}", lambda name=name: write_card(
                self.run.out, self.run.out / name, title))
        self._attempt("the report", lambda: write_report(self.run.out))

    def _attempt(self, what, make):
        try:
            with self.run.attempt(what):
                make()
        except Exception as error:                       # (any kind: the run itself is finished)
            print(f"sidfast: {what} is not written: {one_line(error) or type(error).__name__}", file=sys.stderr,
                  flush=True)

    def evaluate(self, name, network, step, again=False):
        """Measure a one-step generator and keep the numbers under `name`, and an export of the best. Returns what
        `Evaluator.measure` does, or None if no evaluation is wanted."""
        if self._evaluator is None:
            return None
        pipe = self._pipeline(network)
        result = self._evaluator.measure(name, pipe, step, again)
        if step and self.config.evaluation.every:        # (or else there is one to choose from: the last)
            self._evaluator.keep_best(result, pipe, step)
        return result

    def _once(self, *what):
        """The result of a function, the last argument, kept under the other arguments and the settings behind it."""
        *key, make = what
        c = self.config
        key = json.dumps([*key, c.model.model_dump(), c.data.model_dump(), c.train.samples])
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

    def _pipeline(self, network):
        return self.teacher.one_step_pipeline(network, self.config.noise.t_init)

    def _images(self, pipe, **options):
        pipe.set_progress_bar_config(disable=True)
        height, width = self.size
        at_once = max(1, 512 * 512 // (height * width))  # a large image's VAE needs the memory
        images = []
        for start in range(0, len(self.prompts), at_once):
            prompts = self.prompts[start:start + at_once]
            noise = [torch.Generator().manual_seed(start + n) for n in range(len(prompts))]
            images += pipe(prompts, height=height, width=width, generator=noise, **options).images
        return images
