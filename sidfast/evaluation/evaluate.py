"""Generate images from captions and measure them."""

import torch
from tqdm import tqdm


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


def evaluate(generate, captions, metrics, batch_size=250, description="evaluate", disable=False):
    """Make one image per caption, seeds 0, 1, 2, ..., and return `metrics.compute()` of them."""
    for start in tqdm(range(0, len(captions), batch_size), desc=description, disable=disable, mininterval=2):
        batch = captions[start:start + batch_size]
        metrics.update(generate(batch, range(start, start + len(batch))), batch)
    return metrics.compute()
