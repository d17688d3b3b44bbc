"""The synthetic data (method.md, section 7): each source, degradation and kind of diversity against its definition."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import losses, run_jobs
from diffusers import DDIMScheduler, StableDiffusionPipeline
from helpers_method import (
    ALPHAS_CUMPROD,
    POISON,
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

from sidfast.config import Synthetic, build_config
from sidfast.data.diversity import fixed_z, training_prompts
from sidfast.data.prompts import open_prompts
from sidfast.errors import UserError
from sidfast.method.distill import Batch, fake_score_update, generate, generator_update, leave_out
from sidfast.method.synthetic import DEGRADATIONS, SOURCES, Generator, TeacherShare, build_source, cannot_capture
from sidfast.networks.loading import load_teacher
from sidfast.training.batches import Batches, TextEncoder, noise_levels
from sidfast.training.checkpoint import read_tensors
from sidfast.training.loop import with_images


def source_of(networks, objective=None, copies=None, **options):
    return build_source(Synthetic(**options), networks, objective or objective_of(), copies or {},
                        lambda: DDIMScheduler(trained_betas=None))


# Sources


def test_base_source_is_the_generator_to_the_last_bit():
    networks, batch = setting()[:2]
    got = source_of(networks)(batch)
    assert torch.equal(got, generate(networks.generator.module.unet, batch.z, batch.text, objective_of()))


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
        batch.text[3, :, POISON] = 3e38
        batches, spoilt = micro_batches(batch, size), int("generator" in poisoned)
        if shared:
            sums = generator_update(networks, objective)(batches)
            images = sums.images
            assert sums.non_finite == len(poisoned)
            assert [x.isfinite().all().item() for x in images].count(False) == spoilt
            batches = with_images(batches, images)
        source = build_source(Synthetic(), networks, objective, {}, None, shared)
        curves.append((fake_score_update(networks, objective, source)(batches), networks.fake_score))
    (a, fake_a), (b, fake_b) = curves
    assert a.non_finite == b.non_finite == spoilt
    assert a.loss == pytest.approx(b.loss.item(), rel=1e-5)
    assert fake_a.passes == fake_b.passes == 6 // size + spoilt
    torch.testing.assert_close(fake_a.gradients(), fake_b.gradients(), rtol=1e-4, atol=1e-4)


def test_shared_images_come_with_their_prompts():
    shared, usual = batches(shared=True), batches()
    for step in range(3):
        first, second = (joined(shared(step, update)) for update in ("generator", "fake_score"))
        assert torch.equal(first["text"], second["text"]) and not torch.equal(first["t"], second["t"])
        assert torch.equal(joined(usual(step, "fake_score"))["t"], second["t"])
        assert shared.prompt(step, "generator", 1) == shared.prompt(step, "fake_score", 1)
    assert not torch.equal(first["text"], joined(shared(3, "generator"))["text"])


@pytest.mark.parametrize("kind", ["ema", "stale"])
def test_copies_draw_with_the_copy(kind):
    networks, batch = setting()[:2]
    other = setting(seed=3)[0].fake_score.module.unet
    options = {"stale_by": 2} if kind == "stale" else {}
    got = source_of(networks, copies={kind: other}, source=kind, **options)(batch)
    assert torch.equal(got, generate(other, batch.z, batch.text, objective_of()))
    assert not torch.equal(got, source_of(networks)(batch))


def a_and_s(t):
    return ALPHAS_CUMPROD[t] ** 0.5, (1 - ALPHAS_CUMPROD[t]) ** 0.5


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps, levels", [(2, [312]), (4, [469, 312, 156])])
@torch.no_grad()
def test_multistep_is_noising_and_denoising_in_turn(steps, levels, prediction_type):
    networks, batch, networks64, batch64 = setting(noises=steps - 1)
    objective = objective_of(prediction_type=prediction_type)
    got = source_of(networks, objective, source="multistep", steps=steps)(batch)
    for n in range(len(batch.z)):
        x = naive_generate(networks64[0], batch64.z[n], batch64.text[n], objective)
        for k, level in enumerate(levels):
            a, s = a_and_s(level)
            x_t = a * x + s * batch64.noise[n, k]
            x = naive_x_hat(prediction_type, x_t, naive_pass(networks64[0], x_t, level, batch64.text[n]), a, s)
        assert_close(f"image {n}", got[n], x)


@pytest.fixture(scope="module")
def teacher(tiny_teacher):
    return load_teacher(str(tiny_teacher))


@pytest.mark.parametrize("guidance, chance", [(None, [.1, .5, .3, .9, .6]), (1.0, [.1, .5, .41, .9, .39])])
@torch.no_grad()
def test_teacher_s_images_are_those_of_its_pipeline(teacher, guidance, chance):
    """Rows below the share are what diffusers' own pipeline makes of the same z; the others the generator's."""
    prompts = ["a red circle", "a blue square", "", "two shapes", "x"]
    pipe = StableDiffusionPipeline(
        vae=teacher.vae, text_encoder=teacher.text_encoder, tokenizer=teacher.tokenizer, unet=teacher.unet,
        scheduler=DDIMScheduler.from_config(teacher.scheduler.config), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    text, null = (pipe.encode_prompt(p, "cpu", 1, False)[0] for p in (prompts, ""))
    batch = random_batch(5, shape=(4, 8, 8))._replace(text=text, null=null, chance=torch.tensor(chance))
    generator = copy.deepcopy(teacher.unet)
    with torch.no_grad():
        for p in generator.parameters():
            p += 0.01
    engine = SimpleNamespace(module=SimpleNamespace(denoiser=generator))
    networks = SimpleNamespace(generator=engine, teacher=teacher.unet)
    objective = objective_of(kappa4=2.0)
    section = Synthetic(teacher_share=0.4, teacher_steps=4, teacher_guidance=guidance)
    got = build_source(section, networks, objective, {},
                       lambda: DDIMScheduler.from_config(teacher.scheduler.config))(batch)
    want = pipe(prompts, latents=batch.z, num_inference_steps=4, guidance_scale=guidance or 2.0,
                output_type="latent").images
    own = generate(generator, batch.z, text, objective)
    for n, c in enumerate(chance):
        assert_close(f"image {n}", got[n], (want if c < 0.4 else own)[n], 1e-4)


class Zeros:
    """A source of black images."""

    noises = 0

    def __call__(self, batch):
        return torch.zeros_like(batch.z)


def test_samples_left_out_take_none_of_the_teacher_s_places(monkeypatch):
    """Whatever is put in their place: all others get the images that they got before."""
    monkeypatch.setattr(TeacherShare, "_sample", lambda self, z, text, null: torch.ones_like(z))
    source = TeacherShare(Zeros(), None, DDIMScheduler(), 0.3, 2, 1.0)
    batch = random_batch(8)._replace(chance=torch.tensor([.1, .8, .5, .2, .9, .6, .29, 1 - 2**-24]))
    for bad in ([1, 2], [1, 2, 4, 5, 7], [0, 1], [3]):
        finite = torch.ones(8, dtype=torch.bool).index_fill(0, torch.tensor(bad), False)
        *again, keep = leave_out((*batch, torch.ones(8, dtype=torch.bool)), finite)
        got, want = source(Batch(*again)), source(batch)
        assert torch.equal(got[keep], want[keep]) and not got[~keep].any() and want.flatten(1).any(1).sum() == 3


def test_the_generator_may_be_bad_where_the_teacher_draws():
    """The sample that takes a bad one's place is finite by the teacher's image alone."""
    networks, batch, *_ = setting(4, ("generator",), flat=True)
    batch = batch._replace(chance=torch.tensor([0.1, 0.9, 0.9, 0.9]))
    batch.text[[0, 2], :, POISON] = 3e38
    source = TeacherShare(build_source(Synthetic(), networks, objective_of(), {}, None), networks.teacher,
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
    networks, batch = setting(noises=2)[:2]
    clean = source_of(networks, source="multistep", steps=2)
    noisy = source_of(networks, source="multistep", steps=2, degradation="noise", strength=0.3)
    assert (clean.noises, noisy.noises) == (1, 2)
    assert_close("noise", noisy(batch) - clean(batch), 0.3 * batch.noise[:, 1])


def test_every_source_and_degradation_is_tested():
    assert set(SOURCES) == {"generator", "ema", "stale", "multistep"} and set(DEGRADATIONS) == {"blur", "noise"}


def test_what_cuda_graphs_cannot_hold():
    assert cannot_capture(Synthetic()) is None and cannot_capture(Synthetic(source="multistep", steps=2)) is None


@pytest.fixture
def wilful():
    """A source whose shapes depend on values, for as long as a test."""
    class Wilful(Generator, name="wilful"):
        capturable = False

    yield
    del SOURCES["wilful"]


def test_a_source_that_cuda_graphs_cannot_hold(wilful, tiny_config):
    assert "'wilful'" in cannot_capture(Synthetic(source="wilful"))
    with pytest.raises(UserError, match=r"speed\.cuda_graphs.*'wilful'"):
        build_config(tiny_config | {"synthetic": {"source": "wilful"}, "speed": {"cuda_graphs": True}}, "file")


# Batches


class Words:
    """Stands in for the text encoder: an embedding is the prompt's length."""

    null = torch.zeros(1, 1, 1)

    def tokenize(self, prompts):
        return torch.tensor([[len(p)] for p in prompts])

    def __call__(self, ids):
        return ids[..., None].float()


def test_text_is_encoded_by_a_graph(tiny_teacher):
    """With a stand-in for capture, whose replay computes in place, as a graph does."""
    teacher, captured = load_teacher(tiny_teacher), []

    def capture(function):
        result = function()
        captured.append(result.shape)
        return lambda: result.copy_(function()), result

    plain, graphed = (TextEncoder(teacher.tokenizer, teacher.text_encoder, torch.bfloat16, *options)
                      for options in ((), (capture,)))
    ids = [plain.tokenize([f"a {color} circle", "a cross"]) for color in ("red", "green", "blue")]
    got = [graphed(i) for i in ids]
    for embeddings, i in zip(got, ids, strict=True):     # each of its own memory: all three are still there
        assert embeddings.dtype == torch.bfloat16 and torch.equal(embeddings, plain(i))
    assert captured == [got[0].shape] and torch.equal(graphed.null, plain.null)


def batches(prompts="shapes:train", micro=4, noises=0, rank=0, processes=1, noise=None, shared=False, **synthetic):
    config = build_config({"model": {"teacher": "x"}, "data": {"prompts": prompts}, "noise": noise or {},
                           "train": {"steps": 1, "batch_size": 8, "micro_batch": micro, "seed": 5},
                           "synthetic": synthetic}, "test")
    return Batches(training_prompts(prompts, 5, config.synthetic), Words(),
                   noise_levels(objective_of().schedule, config.noise), (4, 3, 2), config.train, 0.1, config.synthetic,
                   noises, torch.device("cpu"), rank, processes, shared)


def joined(pieces):
    return {name: torch.cat([getattr(p, name) for p in pieces]) for name in pieces[0]._fields if name != "null"}


@pytest.mark.parametrize("k, update", enumerate(("fake_score", "generator")))
def test_base_draws_what_it_always_drew(k, update):
    """z, eps, t, dropped in this order from one generator: whatever sources take comes after."""
    got = joined(batches(noises=3)(7, update))
    seed = np.random.SeedSequence([5, 7, k]).generate_state(1, np.uint64)[0]
    g = torch.Generator().manual_seed(int(seed >> np.uint64(1)))
    assert torch.equal(got["z"], torch.randn(8, 4, 3, 2, generator=g))
    assert torch.equal(got["eps"], torch.randn(8, 4, 3, 2, generator=g))
    t = 20 + (torch.rand(8, generator=g, dtype=torch.float64) * 960).floor()
    torch.testing.assert_close(got["t"], t, rtol=0, atol=1e-6)
    assert torch.equal(got["dropped"], torch.rand(8, generator=g) < 0.1)
    plain = joined(batches()(7, update))
    assert all(torch.equal(plain[name], got[name]) for name in ("text", "z", "eps", "t", "dropped"))
    assert got["noise"].shape == (8, 3 if update == "fake_score" else 0, 4, 3, 2) and plain["noise"].shape[1] == 0


@pytest.mark.parametrize("options", [{}, {"z_per_prompt": 2, "unique_prompts": 3, "prompt_repeats": 2},
                                     {"temperature": 0.6}], ids=str)
def test_data_do_not_depend_on_micro_batches_or_processes(options):
    want = joined(batches(noises=2, **options)(3, "fake_score"))
    split = joined(batches(noises=2, micro=2, **options)(3, "fake_score"))
    shares = [joined(batches(noises=2, rank=r, processes=2, **options)(3, "fake_score")) for r in (0, 1)]
    for name, value in want.items():
        assert torch.equal(split[name], value), name
        assert torch.equal(torch.cat([s[name] for s in shares]), value), name


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 1.0])
def test_the_teacher_s_rows_are_dealt_out_evenly(share):
    """No micro-batch has more than are drawn for it, and over many steps each row has its share."""
    stream = batches(teacher_share=share)
    chances = torch.stack([joined(stream(step, "fake_score"))["chance"] for step in range(300)])
    assert (chances >= 0).all() and (chances < 1).all()
    for size in (1, 2, 4, 8):
        counts = (chances < share).unfold(1, size, 1).sum(-1)
        assert (counts >= np.floor(share * size)).all() and (counts <= np.ceil(share * size)).all()
    assert (chances < share).double().mean(0).sub(share).abs().max() < 0.1
    assert chances.mean(0).sub(0.5).abs().max() < 0.1 and chances.std(0).sub(12 ** -0.5).abs().max() < 0.05


def test_temperature_scales_z():
    hot, cold = (joined(batches(temperature=t)(0, "generator")) for t in (1.0, 0.6))
    torch.testing.assert_close(cold["z"], 0.6 * hot["z"])
    assert torch.equal(cold["eps"], hot["eps"])


def test_levels_of_each_update():
    both = batches(noise={"density": "laplace", "generator": {"density": "ddpm", "t_min": 900}})
    plain = batches(noise={"density": "laplace"})
    fake, gen = (joined(both(0, u))["t"] for u in ("fake_score", "generator"))
    assert torch.equal(fake, joined(plain(0, "fake_score"))["t"]) and (gen >= 900).all()
    assert torch.equal(gen, gen.round()) and not torch.equal(fake, fake.round())


# Diversity


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"prompt {n}\n" for n in range(200)))
    return str(path)


@pytest.mark.parametrize("options, count", [({"unique_prompts": 7}, 7), ({"prompt_share": 0.1}, 20)])
def test_few_prompts_of_a_file(lines, options, count):
    prompts = training_prompts(lines, 0, Synthetic(**options))
    epochs = [[prompts[n] for n in range(e * count, (e + 1) * count)] for e in range(3)]
    assert len(set(epochs[0])) == count and sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1]
    other = training_prompts(lines, 1, Synthetic(**options))
    assert {other[n] for n in range(count)} != set(epochs[0])


def test_all_prompts_unless_told_otherwise(lines):
    plain = open_prompts(lines, 3)
    prompts = training_prompts(lines, 3, Synthetic())
    assert [prompts[n] for n in range(300)] == [plain[n] for n in range(300)]


def test_few_prompts_of_the_shapes_world():
    prompts = training_prompts("shapes:train", 0, Synthetic(unique_prompts=1500))
    plain = open_prompts("shapes:train", 0)
    for epoch in range(2):                               # a short caption as often as in the whole world
        assert sorted(prompts[1500 * epoch + n] for n in range(1500)) == sorted(plain[n] for n in range(1500))


def test_repeats(lines):
    plain, prompts = open_prompts(lines, 0), training_prompts(lines, 0, Synthetic(prompt_repeats=3))
    assert [prompts[n] for n in range(9)] == [plain[n // 3] for n in range(9)]


def test_more_prompts_than_there_are(lines):
    with pytest.raises(UserError, match=r"synthetic.unique_prompts \(201\).*200 prompts"):
        training_prompts(lines, 0, Synthetic(unique_prompts=201))


def test_z_of_a_prompt():
    got = joined(batches(unique_prompts=2, z_per_prompt=3)(0, "fake_score"))
    seen = {}
    stream = batches(unique_prompts=2, z_per_prompt=3)
    for step in range(12):
        for update in ("fake_score", "generator"):
            prompts = stream._text(2 * step + (update == "generator"))[0]
            for prompt, z in zip(prompts, joined(stream(step, update))["z"], strict=True):
                seen.setdefault(prompt, set()).add(z.numpy().tobytes())
    assert [len(z) for z in seen.values()] == [3, 3] and not set.intersection(*seen.values())
    pool = torch.stack([fixed_z([p], [k], 5, (4, 3, 2))[0] for p in seen for k in range(3)])
    assert all((z == pool).flatten(1).all(1).any() for z in got["z"])
    many = fixed_z(["a"] * 400, range(400), 0, (4, 3, 2))
    assert abs(many.mean()) < 0.04 and abs(many.std() - 1) < 0.03


# Whole runs


SHARED = ({"degradation": "noise", "strength": 0.2}, {"speed": {"share_generator_forward": True}})
STALE, EMA = ({"source": "stale", "stale_by": 2}, {}), ({"source": "ema"}, {"ema": {"half_life": 8}})
SPARSE = ({"source": "stale", "stale_by": 2, "stale_every": 2}, {})
STEPS = ({"source": "multistep", "steps": 3, "teacher_share": 0.5, "teacher_steps": 2, "degradation": "noise",
          "strength": 0.2, "z_per_prompt": 2}, {})


def jobs(config, folder, train, **sources):
    """Training jobs: {name: (the `synthetic` section, other sections)} with other values of `train`."""
    return [{"config": config | {"train": config["train"] | {"steps": 6, "save_every": 3} | train, "synthetic": section,
                                 **more}, "out": str(folder / name)} for name, (section, more) in sources.items()]


def sharded(source, stage):
    return source[0], source[1] | {"deepspeed": {"zero_optimization": {"stage": stage}}}


@pytest.fixture(scope="module")
def runs(tiny_config, tmp_path_factory):
    """Runs of six steps in one process: whole ones, and others in two pieces."""
    folder = tmp_path_factory.mktemp("synthetic")
    at_once, half = {"ema": {"half_life": 0}}, {"steps": 4, "save_every": 4}
    run_jobs([*jobs(tiny_config, folder, {}, base=({}, at_once), same=({"source": "ema"}, at_once), ema=EMA),
              *jobs(tiny_config, folder, {"save_every": 1, "keep": 9}, stale=STALE),
              *jobs(tiny_config, folder, {}, shared=SHARED),
              *jobs(tiny_config, folder, {"fake_score_factor": 2}, shared_wide=SHARED),
              *jobs(tiny_config, folder, half, stale_cut=STALE, ema_cut=EMA, shared_cut=SHARED),
              *jobs(tiny_config, folder, {}, stale_cut=STALE, ema_cut=EMA, shared_cut=SHARED)], folder, 1, 29811)
    return folder


@pytest.fixture(scope="module")
def more_runs(tiny_config, runs):
    half = {"steps": 4, "save_every": 4}
    run_jobs([*jobs(tiny_config, runs, {"save_every": 1, "keep": 9}, sparse=SPARSE),
              *jobs(tiny_config, runs, {}, steps=STEPS),
              *jobs(tiny_config, runs, {"micro_batch": 4}, one_pass=STEPS),
              *jobs(tiny_config, runs, half, sparse_cut=SPARSE, steps_cut=STEPS),
              *jobs(tiny_config, runs, {}, sparse_cut=SPARSE, steps_cut=STEPS),
              # Last: DeepSpeed's ZeRO 3 leaves its own torch.nn.functional.linear behind in the process.
              *jobs(tiny_config, runs, {}, steps_sharded=sharded(STEPS, 3), ema_sharded=sharded(EMA, 3),
                    stale_sharded=sharded(STALE, 2))], runs, 1, 29812)
    return runs


@pytest.fixture(scope="module")
def pairs(tiny_config, more_runs):
    """The same on two processes; one goes on in another stage, from what one process left."""
    [moved] = jobs(tiny_config, more_runs, {}, moved=sharded(STALE, 3))
    moved["resume"] = str(more_runs / "stale" / "checkpoints" / "step-00000004")
    run_jobs([*jobs(tiny_config, more_runs, {}, steps_pair=STEPS, ema_pair=sharded(EMA, 3),
                    stale_pair=sharded(STALE, 1)), moved], more_runs, 2, 29813)
    return more_runs


def assert_goes_on(runs, name):
    assert losses(runs / f"{name}_cut") == losses(runs / name) != losses(runs / "base")
    for network in ("generator", "fake_score"):
        a, b = (read_tensors(runs / run / "checkpoints" / "step-00000006", network, "weights")
                for run in (name, f"{name}_cut"))
        assert a and all(torch.equal(a[key], b[key]) for key in a)


def assert_same_curve(runs, name, other):
    want, got = losses(runs / name), losses(runs / other)
    want = want[len(want) - len(got):]
    assert got
    for (_, *a), (_, *b) in zip(want, got, strict=True):
        assert a == pytest.approx(b, rel=1e-3)


def assert_as_old_as(runs, name, by, every):
    """The copies that a checkpoint keeps are the generator's weights of the steps before, and no more than needed."""
    for step in (4, 6):
        folder = runs / name / "checkpoints"
        files = (folder / f"step-{step:08d}").glob("generator.stale_*")
        kept = {int(f.name.split("_")[1].split("-")[0]) for f in files}
        oldest = max(0, (step - 1 - by) // every * every)
        assert kept == set(range(oldest, step, every))
        for version in kept - {0}:
            got = read_tensors(folder / f"step-{step:08d}", "generator", f"stale_{version:08d}")
            want = read_tensors(folder / f"step-{version:08d}", "generator", "weights")
            assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)


@pytest.mark.slow
def test_average_without_memory_is_the_generator(runs):
    assert losses(runs / "same") == losses(runs / "base") and len(losses(runs / "base")) == 6


@pytest.mark.slow
def test_shared_images_in_larger_passes(runs):
    for (_, *got), (_, *want) in zip(losses(runs / "shared_wide"), losses(runs / "shared"), strict=True):
        assert got == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("name", ["stale", "ema", "shared"])
def test_an_interrupted_run_goes_on_exactly(runs, name):
    assert_goes_on(runs, name)


@pytest.mark.slow
def test_copies_are_as_old_as_they_should_be(runs):
    assert_as_old_as(runs, "stale", 2, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sparse", "steps"])
def test_more_interrupted_runs_go_on_exactly(more_runs, name):
    assert_goes_on(more_runs, name)


@pytest.mark.slow
def test_copies_every_few_steps(more_runs):
    assert_as_old_as(more_runs, "sparse", 2, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name, other", [("steps", "one_pass"), ("steps", "steps_sharded"), ("ema", "ema_sharded"),
                                         ("stale", "stale_sharded")])
def test_same_curve_however_it_is_split(more_runs, name, other):
    assert_same_curve(more_runs, name, other)


@pytest.mark.slow
@pytest.mark.parametrize("name, other", [("steps", "steps_pair"), ("ema", "ema_pair"), ("stale", "stale_pair"),
                                         ("stale", "moved")])
def test_same_curve_on_two_processes(pairs, name, other):
    assert_same_curve(pairs, name, other)


# Mistakes


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


@pytest.mark.parametrize("noise, words", [
    ({"fake_score": {"t_min": 980}}, ["noise.fake_score", "980", "979"]),
    ({"generator": {"density": "edn"}}, ["noise.generator.density", "'edn'", "'edm'"]),
    ({"density": "edm", "std": 1.0, "generator": {"density": "edm", "shift": 2.0}}, ["noise.generator.shift", "'edm'"]),
    ({"fake_score": {"rho": 3.0}}, ["noise.fake_score.rho", "'ddpm'"]),
], ids=str)
def test_levels_that_make_no_sense(tiny_config, noise, words):
    with pytest.raises(UserError) as caught:
        build_config(tiny_config | {"noise": noise}, "file")
    text = str(caught.value)
    assert all(word in text for word in words) and "\n" not in text, text


def test_levels_of_an_update_take_over_what_they_do_not_say(tiny_config):
    noise = build_config(tiny_config | {"noise": {"density": "edm", "std": 0.7, "t_min": 50, "fake_score": {
        "mean": 0.5}, "generator": {"density": "karras", "t_max": 900}}}, "file").noise
    assert noise.levels("fake_score") == ("edm", 50, 979, {"std": 0.7, "mean": 0.5})
    assert noise.levels("generator") == ("karras", 50, 900, {})
