"""The committed networks, which know the shapes world: checker, CLIP and teacher, on real drawings."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from helpers_evaluate import ASSETS, shapes_judge
from test_shapes import fields, scenes_of, seeded, share
from transformers import AutoTokenizer

from sidfast.data import shapes
from sidfast.evaluation.attributes import correct, load_checker
from sidfast.evaluation.evaluate import evaluate
from sidfast.evaluation.features import tokenize

N = 500                                                  # for the checker
FEW = 256                                                # for the other measures


@pytest.fixture(scope="module")
def drawings():
    """(scenes, captions, images in [-1, 1]) of N held-out scenes."""
    scenes = scenes_of(N, "held_out", seed=3)
    return scenes, shapes.captions(scenes), shapes.draw(scenes, seeded(4))


def blurred(images, times=2):
    """Images smoothed over 5 x 5 pixels, twice."""
    for _ in range(times):
        images = F.avg_pool2d(F.pad(images, (2,) * 4, mode="replicate"), 5, 1)
    return images


def measured(images, captions):
    def stored(_, seeds):
        return (images[seeds.start:seeds.stop] + 1) / 2

    return evaluate(stored, captions[:FEW], shapes_judge(), 100)


def shuffled(captions):
    return captions[1:] + captions[:1]


@pytest.fixture(scope="module")
def right(drawings):
    _, captions, images = drawings
    return measured(images, captions)


def test_checker_reads_real_drawings(drawings):
    scenes, captions, images = drawings
    checker = load_checker(ASSETS / "checker")
    with torch.no_grad():
        hits = correct(checker(images), scenes)
    assert {name: h.shape for name, h in hits.items()} == dict.fromkeys(
        ("count", "layout", "background", "size", "color", "shape", "all"), (N,))
    assert {name for name, h in hits.items() if share(h) < 0.99} == set()
    with torch.no_grad():
        other = correct(checker(images), shapes.parse_captions(shuffled(captions)))
    assert share(other["all"]) < 0.20


@pytest.mark.parametrize("name", ("background", "size", "color", "shape"))
def test_checker_sees_a_single_change(drawings, name):
    """One attribute of the first object (or the background) drawn otherwise: that one is wrong, the others right."""
    scenes = drawings[0][:200]
    value = getattr(scenes, name).clone()
    k = len({"background": shapes.BACKGROUNDS, "size": shapes.SIZES, "color": shapes.COLORS,
             "shape": shapes.SHAPES}[name])
    first = value if value.ndim == 1 else value[:, 0]
    first.copy_((first + 1) % k)
    images = shapes.draw(dataclasses.replace(scenes, **{name: value}), seeded(5))
    with torch.no_grad():
        hits = correct(load_checker(ASSETS / "checker")(images), scenes)
    assert share(hits[name]) < 0.02 and share(hits["all"]) < 0.02
    assert all(share(h) >= 0.99 for other, h in hits.items() if other not in (name, "all"))


def test_absent_objects_do_not_count():
    scenes = shapes.parse_captions(["a small red circle on a white background"])
    logits = {name: F.one_hot(getattr(scenes, name), 10).float() for name in fields(scenes) if name != "told_from_end"}
    for name in ("size", "color", "shape"):
        logits[name][:, 1:] = logits[name][:, 1:].roll(1, -1)
    assert correct(logits, scenes)["all"].tolist() == [True]
    logits["shape"][:, 0] = logits["shape"][:, 0].roll(1, -1)
    hits = correct(logits, scenes)
    assert not hits["shape"].any() and not hits["all"].any() and hits["color"].all()


def test_metrics_of_right_and_wrong_captions(drawings, right):
    _, captions, images = drawings
    wrong = measured(images, shuffled(captions))
    assert right["images"] == wrong["images"] == FEW
    assert right["accuracy"] >= 0.99 and wrong["accuracy"] < 0.20
    assert right["clip_score"] > 0.85
    assert wrong["clip_score"] < right["clip_score"] - 0.2


def test_clip_score_is_the_mean_cosine(drawings, right):
    """The same number from transformers' own CLIP forward."""
    from transformers import CLIPModel

    _, captions, images = drawings
    clip = CLIPModel.from_pretrained(ASSETS / "clip", dtype=torch.float32).eval()
    ids = tokenize(AutoTokenizer.from_pretrained(ASSETS / "clip"), captions[:FEW])
    with torch.no_grad():
        out = clip(input_ids=ids, pixel_values=images[:FEW])
    cosine = F.cosine_similarity(out.text_embeds, out.image_embeds).mean().item()
    assert right["clip_score"] == pytest.approx(cosine, abs=1e-5)


def test_fid_of_real_and_blurred_drawings(drawings, right):
    """Real drawings at other positions are near the true world, blurred ones far."""
    _, captions, images = drawings
    blurry = measured(blurred(images), captions)
    assert 0 <= right["fid_small_clip"] < 15             # (0.5 for 5000 images: few images read high)
    assert blurry["fid_small_clip"] > 2.5 * right["fid_small_clip"]


# The committed teacher


def test_assets_are_small():
    assert sum(p.stat().st_size for p in ASSETS.rglob("*") if p.is_file()) <= 20e6
    weights = [p for p in ASSETS.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
    assert not weights, "weights are safetensors only"


def test_teacher_is_a_plain_stable_diffusion_pipeline():
    """It draws what captions say, and as it stands the images that it makes in float32."""
    from diffusers import StableDiffusionPipeline

    captions = shapes.captions(scenes_of(16, "held_out", seed=9))

    def images_of(n, **options):
        pipe = StableDiffusionPipeline.from_pretrained(ASSETS / "teacher", low_cpu_mem_usage=False, **options)
        pipe.set_progress_bar_config(disable=True)
        assert type(pipe) is StableDiffusionPipeline
        return pipe(captions[:n], num_inference_steps=12, guidance_scale=1.5, output_type="pt",
                    generator=[seeded(k) for k in range(n)]).images

    images = images_of(16, torch_dtype=torch.float32)
    assert images.shape == (16, 3, 64, 64)
    assert torch.allclose(images_of(2), images[:2], atol=1e-3)
    with torch.no_grad():
        hits = correct(load_checker(ASSETS / "checker")(images * 2 - 1), shapes.parse_captions(captions))
    assert share(hits["all"]) > 0.8                      # it draws what captions say that it has never seen
