"""Generate images from captions and measure them."""

import json
import time
from pathlib import Path

import torch
from tqdm import tqdm

from sidfast.data.prompts import ShapesPrompts
from sidfast.errors import UserError
from sidfast.evaluation.metrics import load_shapes_metrics
from sidfast.publishing.export import load_pipeline, sampler_options


def pipeline_generator(pipe, **options):
    """`generate(prompts, seeds) -> images [N, 3, H, W] in [0, 1]` out of a diffusers pipeline.

    `options` go to every call of the pipeline (num_inference_steps, guidance_scale). Each image has a seed of its own,
    drawn on the CPU, so an image does not depend on the batch that it is made in, nor on the device.
    """
    pipe.set_progress_bar_config(disable=True)

    def generate(prompts, seeds):
        noise = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(list(prompts), generator=noise, output_type="pt", **options).images

    return generate


def evaluate(generate, captions, metrics, batch_size=250, description="evaluate"):
    """Make one image per caption, seeds 0, 1, 2, ..., and return `metrics.compute()` of them."""
    for start in tqdm(range(0, len(captions), batch_size), desc=description, mininterval=2):
        batch = captions[start:start + batch_size]
        metrics.update(generate(batch, range(start, start + len(batch))), batch)
    return metrics.compute()


def held_out_captions(n):
    """The first n captions of the evaluation set: never seen in training, the same for every model."""
    captions = ShapesPrompts("held_out", seed=1)
    return [captions[i] for i in range(n)]


def evaluate_model(model, images, steps, guidance, batch_size, assets, out, device):
    """Measure a model on `images` held-out captions of the shapes world and write the result as JSON to `out`.

    In fp32. Raises UserError for a model, assets or folder that is not there.
    """
    out = Path(out)
    if images < 2 or batch_size < 1:
        raise UserError(f"--images ({images}) must be at least 2 and --batch-size ({batch_size}) at least 1")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.parent} does not exist")
    metrics = load_shapes_metrics(assets, device)
    pipe, one_step = load_pipeline(model, device)
    options = sampler_options(model, one_step, steps, guidance)
    started = time.time()
    result = evaluate(pipeline_generator(pipe, **options), held_out_captions(images), metrics, batch_size)
    result = {"model": str(model), **options, **result, "seconds": round(time.time() - started, 1)}
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
