"""The sources of synthetic data and their degradations (method.md, section 7), each against its definition."""

import copy

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from helpers_method import (
    ALPHAS_CUMPROD,
    POISON,
    TEXT,
    assert_close,
    micro_batches,
    naive_generate,
    naive_pass,
    naive_x_hat,
    objective_of,
    random_batch,
    setting,
)
from scipy import ndimage

from sidfast.common.errors import UserError
from sidfast.config.schema import Synthetic, build_config
from sidfast.engines.update import fake_score_update, generator_update
from sidfast.method.generator import generate
from sidfast.method.synthetic import DEGRADATIONS, SOURCES, Generator, TeacherShare, build_source, capture_blocker
from sidfast.method.updates import leave_out
from sidfast.teachers.load import load_teacher
from sidfast.teachers.sd import StableDiffusion
from sidfast.training.loop import with_images


def source_of(networks, objective=None, copies=None, **options):
    return build_source(Synthetic(**options), networks.generator.module.denoiser, networks.teacher,
                        objective or objective_of(), copies or {}, lambda: DDIMScheduler(trained_betas=None))


def test_base_source_is_the_generator_to_the_last_bit():
    networks, batch = setting()[:2]
    got = source_of(networks)(batch)
    assert torch.equal(got, generate(networks.generator.module.network, batch.z, batch.cond, objective_of()))


def test_update_on_the_base_source_is_the_paper_s_to_the_last_bit():
    curves = []
    for source in (None, source_of):
        networks, batch = setting()[:2]
        update = fake_score_update(networks, objective_of(1.5, 1.5, 1.5, 1.5), source and source(networks))
        curves.append((update([batch]), networks.fake_score.gradients()))
    (a, grads_a), (b, grads_b) = curves
    assert torch.equal(a.loss, b.loss) and all(torch.equal(grads_a[name], grads_b[name]) for name in grads_a)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("poisoned", [(), ("generator",), ("teacher",)])
def test_shared_images_are_those_of_the_generator_s_update(poisoned, size):
    """The fake score's update on them is the one that makes the same images again; what is not finite stays out."""
    curves, objective = [], objective_of(1.5, 1.5, 1.5, 1.5)
    for shared in (True, False):
        networks, batch = setting(6, poisoned, accumulation=6 // size)[:2]
        batch.cond[TEXT][3, :, POISON] = 3e38
        batches, spoilt = micro_batches(batch, size), int("generator" in poisoned)
        if shared:
            sums = generator_update(networks, objective)(batches)
            images = sums.images
            assert sums.non_finite == len(poisoned)
            assert [x.isfinite().all().item() for x in images].count(False) == spoilt
            batches = with_images(batches, images)
        generator = networks.generator.module.denoiser
        source = build_source(Synthetic(), generator, networks.teacher, objective, {}, None, shared)
        curves.append((fake_score_update(networks, objective, source)(batches), networks.fake_score))
    (a, fake_a), (b, fake_b) = curves
    assert a.non_finite == b.non_finite == spoilt
    assert a.loss == pytest.approx(b.loss.item(), rel=1e-5)
    assert fake_a.passes == fake_b.passes == 6 // size + spoilt
    torch.testing.assert_close(fake_a.gradients(), fake_b.gradients(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["ema", "stale"])
def test_copies_draw_with_the_copy(kind):
    networks, batch = setting()[:2]
    other = setting(seed=3)[0].fake_score.module.network
    options = {"stale_by": 2} if kind == "stale" else {}
    got = source_of(networks, copies={kind: other}, source=kind, **options)(batch)
    assert torch.equal(got, generate(other, batch.z, batch.cond, objective_of()))
    assert not torch.equal(got, source_of(networks)(batch))


def a_and_s(t):
    return ALPHAS_CUMPROD[t] ** 0.5, (1 - ALPHAS_CUMPROD[t]) ** 0.5


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps, levels", [(2, [312]), (4, [469, 312, 156])])
@torch.no_grad()
def test_multistep_is_noising_and_denoising_in_turn(steps, levels, prediction_type):
    networks, batch, networks64, batch64 = setting(num_extra_noise=steps - 1)
    objective = objective_of(prediction_type=prediction_type)
    got = source_of(networks, objective, source="multistep", steps=steps)(batch)
    for n in range(len(batch.z)):
        x = naive_generate(networks64[0], batch64.z[n], batch64.cond[TEXT][n], objective)
        for k, level in enumerate(levels):
            a, s = a_and_s(level)
            x_t = a * x + s * batch64.noise[n, k]
            x = naive_x_hat(prediction_type, x_t, naive_pass(networks64[0], x_t, level, batch64.cond[TEXT][n]), a, s)
        assert_close(f"image {n}", got[n], x)


@pytest.fixture(scope="module")
def teacher(tiny_teacher):
    return load_teacher(str(tiny_teacher))


@pytest.mark.parametrize("guidance, teacher_draw", [(None, [.1, .5, .3, .9, .6]), (1.0, [.1, .5, .41, .9, .39])])
@torch.no_grad()
def test_teacher_s_images_are_those_of_its_pipeline(teacher, guidance, teacher_draw):
    """Rows below the share are what diffusers' own pipeline makes of the same z; the others the generator's."""
    prompts = ["a red circle", "a blue square", "", "two shapes", "x"]
    parts = teacher.parts | {"scheduler": DDIMScheduler.from_config(teacher.parts["scheduler"].config)}
    pipe = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    text, null = (pipe.encode_prompt(p, "cpu", 1, False)[0] for p in (prompts, ""))
    batch = random_batch(5, shape=(4, 8, 8))._replace(cond={TEXT: text}, uncond={TEXT: null},
                                                      teacher_draw=torch.tensor(teacher_draw))
    generator = copy.deepcopy(teacher.network)
    with torch.no_grad():
        for p in generator.parameters():
            p += 0.01
    objective = objective_of(kappa4=2.0)
    section = Synthetic(teacher_share=0.4, teacher_steps=4, teacher_guidance=guidance)
    got = build_source(section, generator, teacher.network, objective, {},
                       lambda: DDIMScheduler.from_config(teacher.parts["scheduler"].config))(batch)
    want = pipe(prompts, latents=batch.z, num_inference_steps=4, guidance_scale=guidance or 2.0,
                output_type="latent").images
    own = generate(generator, batch.z, {TEXT: text}, objective)
    for n, c in enumerate(teacher_draw):
        assert_close(f"image {n}", got[n], (want if c < 0.4 else own)[n], 1e-4)


class Zeros:
    """A source of black images."""

    num_extra_noise = 0

    def __call__(self, batch):
        return torch.zeros_like(batch.z)


def test_samples_left_out_take_none_of_the_teacher_s_places(monkeypatch):
    """Whatever is put in their place: all others get the images that they got before."""
    monkeypatch.setattr(TeacherShare, "_sample", lambda self, z, cond, uncond: torch.ones_like(z))
    source = TeacherShare(Zeros(), None, StableDiffusion().predict, DDIMScheduler(), 0.3, 2, 1.0)
    batch = random_batch(8)._replace(teacher_draw=torch.tensor([.1, .8, .5, .2, .9, .6, .29, 1 - 2**-24]))
    for bad in ([1, 2], [1, 2, 4, 5, 7], [0, 1], [3]):
        finite = torch.ones(8, dtype=torch.bool).index_fill(0, torch.tensor(bad), False)
        again, keep = leave_out(batch, finite)
        got, want = source(again), source(batch)
        assert torch.equal(got[keep], want[keep]) and not got[~keep].any() and want.flatten(1).any(1).sum() == 3


def test_the_generator_may_be_bad_where_the_teacher_draws():
    """The sample that takes a bad one's place is finite by the teacher's image alone."""
    networks, batch, *_ = setting(4, ("generator",), flat=True)
    batch = batch._replace(teacher_draw=torch.tensor([0.1, 0.9, 0.9, 0.9]))
    batch.cond[TEXT][[0, 2], :, POISON] = 3e38
    source = TeacherShare(source_of(networks), networks.teacher, StableDiffusion().predict,
                          DDIMScheduler(clip_sample=False), 0.25, 2, 1.0)
    sums = fake_score_update(networks, objective_of(), source)([batch])
    assert sums.non_finite == 1 and sums.losses.isfinite().all() and (sums.losses > 0).tolist() == [1, 1, 0, 1]
    gradients = networks.fake_score.gradients()
    gradients["text.weight"] = gradients["text.weight"][:, :POISON]              # (3e38 stands in the text itself)
    assert all(g.isfinite().all() for g in gradients.values())


@pytest.mark.parametrize("strength", [0.4, 1.0, 1.7])
def test_blur_is_a_gaussian(strength):
    networks, batch = setting(shape=(4, 12, 11))[:2]
    x = source_of(networks)(batch).detach()
    got = source_of(networks, degradation="blur", strength=strength)(batch)
    radius = min(int(np.ceil(3 * strength)), 10)
    want = ndimage.gaussian_filter(x.double().numpy(), (0, 0, strength, strength), mode="mirror", radius=(0, 0, radius,
                                                                                                         radius))
    assert_close("blurred", got, torch.from_numpy(want), 1e-5)


def test_noise_comes_on_top_of_any_source():
    networks, batch = setting(num_extra_noise=2)[:2]
    clean = source_of(networks, source="multistep", steps=2)
    noisy = source_of(networks, source="multistep", steps=2, degradation="noise", strength=0.3)
    assert (clean.num_extra_noise, noisy.num_extra_noise) == (1, 2)
    assert_close("noise", noisy(batch) - clean(batch), 0.3 * batch.noise[:, 1])


def test_every_source_and_degradation_is_tested():
    assert set(SOURCES) == {"generator", "ema", "stale", "multistep"} and set(DEGRADATIONS) == {"blur", "noise"}


def test_what_cuda_graphs_cannot_hold():
    assert capture_blocker(Synthetic()) is None and capture_blocker(Synthetic(source="multistep", steps=2)) is None


@pytest.fixture
def wilful():
    """A source whose shapes depend on values, for as long as a test."""
    class Wilful(Generator, name="wilful"):
        capturable = False

    yield
    del SOURCES["wilful"]


def test_a_source_that_cuda_graphs_cannot_hold(wilful, tiny_config):
    assert "'wilful'" in capture_blocker(Synthetic(source="wilful"))
    with pytest.raises(UserError, match=r"speed\.cuda_graphs.*'wilful'"):
        build_config(tiny_config | {"synthetic": {"source": "wilful"}, "speed": {"cuda_graphs": True}}, "file")


@pytest.mark.parametrize("section, words", [
    ({"source": "teacher"}, ["synthetic.source", "'generator', 'ema', 'stale', 'multistep'", "'teacher'"]),
    ({"source": "stale"}, ["synthetic.stale_by is needed"]),
    ({"stale_by": 3}, ["synthetic.stale_by has no meaning", "'generator'"]),
    ({"source": "stale", "stale_by": 10, "stale_every": 3}, ["stale_every (3)", "stale_by (10)"]),
    ({"source": "ema", "steps": 2}, ["synthetic.steps has no meaning", "'ema'"]),
    ({"teacher_steps": 5}, ["teacher_steps", "teacher_share"]),
    ({"degradation": "blur"}, ["degradation", "strength"]),
    ({"strength": 1.0}, ["degradation", "strength"]),
    ({"degradation": "jpeg", "strength": 1.0}, ["synthetic.degradation", "'blur', 'noise'"]),
    ({"unique_prompts": 5, "prompt_share": 0.1}, ["unique_prompts", "prompt_share"]),
    ({"prompt_share": 0.1}, ["prompt_share", "shapes world", "unique_prompts"]),
    ({"temperature": 0}, ["synthetic.temperature"]), ({"teacher_share": 1.5}, ["synthetic.teacher_share"]),
    ({"surce": "ema"}, ["unknown key synthetic.surce", "synthetic.source"]),
], ids=str)
def test_settings_that_make_no_sense(tiny_config, section, words):
    with pytest.raises(UserError) as caught:
        build_config(tiny_config | {"synthetic": section}, "file")
    text = str(caught.value)
    assert all(word in text for word in words) and "\n" not in text, text
