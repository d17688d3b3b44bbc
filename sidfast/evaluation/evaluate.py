"""Generate images from captions and measure them."""

from sidfast.data.prompts import ShapesPrompts
from sidfast.evaluation.metrics import compute
from sidfast.evaluation.reference import drawn_reference
from sidfast.evaluation.rows import MemoryRows, collect
from sidfast.publishing.generate import make_images


def pipeline_generator(pipe, **options):
    """`generate(prompts, seeds) -> images [N, 3, H, W] in [0, 1]` out of a diffusers pipeline.

    `options` go to every call of the pipeline (num_inference_steps, guidance_scale). See `make_images`.
    """
    pipe.set_progress_bar_config(disable=True)
    return lambda prompts, seeds: make_images(pipe, prompts, seeds, **options)


def evaluate(generate, captions, judge, batch_size=250, description="evaluate"):
    """Make one image per caption of the shapes world, seeds 0, 1, 2, ..., and compare them with the true world.

    Returns {"images", "accuracy", "accuracy_<attribute>"..., "clip_score", "fid_small_clip"} as plain numbers. In
    memory, in this process alone.
    """
    rows = MemoryRows()
    collect(lambda start, stop: generate(captions[start:stop], range(start, stop)), captions, judge.rows, rows,
            batch_size, description)
    return {"images": len(captions)} | compute(rows, {"accuracy", "clip", "fid"}, drawn_reference(captions, judge),
                                               judge.features.suffix)


def held_out_captions(n):
    """The first n captions of the evaluation set: never seen in training, the same for every model."""
    captions = ShapesPrompts("held_out", seed=1)
    return [captions[i] for i in range(n)]
