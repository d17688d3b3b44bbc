"""What a run shows of itself: sample grids, the export, and measures on the shapes world. First process only."""

import copy

import torch

from sidfast.data.prompts import open_prompts
from sidfast.evaluation.evaluate import evaluate, held_out_captions, pipeline_generator
from sidfast.evaluation.judge import load_shapes_judge
from sidfast.evaluation.report import write_report
from sidfast.networks.fused import unfuse
from sidfast.publishing.card import write_card
from sidfast.publishing.export import one_step_pipeline, write_export
from sidfast.publishing.grid import image_grid

_TEACHER_STEPS = 50


class Preview:
    """Looks at the teacher and at the averaged generator through the pipelines that users have, in fp32."""

    def __init__(self, config, teacher, run):
        self.config, self.teacher, self.run = config, teacher, run
        source = config.data.prompts
        held_out = "shapes:held_out" if source.startswith("shapes:") else source
        prompts = open_prompts(held_out, seed=1)
        self.prompts = [prompts[n] for n in range(config.train.samples)]
        self._rows = {}

    def begin(self, step):
        """Everything that shows the teacher, before training casts it to its own type."""
        teacher = {"guidance_scale": self.config.guidance.kappa4, "num_inference_steps": _TEACHER_STEPS}
        if self.prompts:
            name = f"teacher, {_TEACHER_STEPS} steps, guidance {self.config.guidance.kappa4:g}"
            self._rows = {name: self._images(self._teacher_pipeline(), **teacher),
                          "student at start, 1 step": self._images(self._pipeline(self.teacher.unet))}
        if step == 0:
            self.sample(0, self.teacher.unet)
        self.evaluate("start", self.teacher.unet, 0)
        if self.config.evaluation.teacher:
            self._evaluate("teacher", self._teacher_pipeline(), None, **teacher)

    def student(self, weights):
        """A UNet with other weights ({name: fp32})."""
        unet = unfuse(copy.deepcopy(self.teacher.unet)).float()
        unet.load_state_dict(weights)
        return unet

    def sample(self, step, unet):
        """Save a grid: the teacher in 50 steps, the student at the start of the run, the student now."""
        if self.prompts:
            now = {f"student after {step} updates, 1 step": self._images(self._pipeline(unet))}
            self.run.sample(step, image_grid(self._rows | now, self.prompts))

    def export(self, unet, folder):
        """Write the one-step pipeline of a UNet."""
        write_export(self._pipeline(unet), folder)

    def finish(self):
        """The model card of the export, and the report, once everything else is there."""
        write_card(self.run.out)
        write_report(self.run.out)

    def evaluate(self, name, unet, step, again=False):
        """Measure a one-step generator on held-out captions and keep the result under `name`; None if not wanted."""
        return self._evaluate(name, self._pipeline(unet), step, again)

    def _evaluate(self, name, pipe, step, again=False, **options):
        section = self.config.evaluation
        if not section.images:
            return None
        known = self.run.evaluation(name)
        if known and known["images"] == section.images and not again:
            return known
        judge = load_shapes_judge(section.assets, pipe.device)
        result = evaluate(pipeline_generator(pipe, **options), held_out_captions(section.images), judge,
                          section.batch_size, f"evaluate {name}")
        self.run.evaluation(name, result)
        if step is not None:
            self.run.log(step, {f"evaluation/{key}": value for key, value in result.items()})
        return result

    def _pipeline(self, unet):
        return one_step_pipeline(self.teacher, unet, self.config.noise.t_init)

    def _teacher_pipeline(self):
        from diffusers import DDIMScheduler, StableDiffusionPipeline

        t = self.teacher
        return StableDiffusionPipeline(
            vae=t.vae, text_encoder=t.text_encoder, tokenizer=t.tokenizer, unet=t.unet, safety_checker=None,
            scheduler=DDIMScheduler.from_config(t.scheduler.config), feature_extractor=None,
            requires_safety_checker=False)

    def _images(self, pipe, **options):
        pipe.set_progress_bar_config(disable=True)
        side = self.config.model.resolution or self.teacher.resolution
        at_once = max(1, 512 * 512 // side**2)           # a large image's VAE needs the memory
        images = []
        for start in range(0, len(self.prompts), at_once):
            prompts = self.prompts[start:start + at_once]
            noise = [torch.Generator().manual_seed(start + n) for n in range(len(prompts))]
            images += pipe(prompts, height=side, width=side, generator=noise, **options).images
        return images
