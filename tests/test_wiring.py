"""From the configuration to the method: a run whose every setting is unusual, against the equations of method.md."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import losses
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from helpers_input import edit
from helpers_method import (
    assert_close,
    in_float64,
    naive_fake_score_update,
    naive_generate,
    naive_generator_update,
    objective_of,
)
from helpers_training import train_here
from tiny import NO_MIDDLE, write_tiny_teacher
from torch import nn
from transformers import AutoTokenizer, CLIPTextModel

from sidfast import cli
from sidfast.accel.plan import Speed
from sidfast.accel.prepacked import Prepacked
from sidfast.checkpoints.store import read_tensors
from sidfast.config.schema import build_config
from sidfast.data import shapes
from sidfast.method.conditions import cat
from sidfast.method.updates import Batch
from sidfast.publishing.grid import read_grid
from sidfast.publishing.load import load_pipeline
from sidfast.teachers.load import load_teacher
from sidfast.training import trainer

KAPPAS, ALPHA, T_INIT, FACTOR = (1.2, 1.7, 2.3, 3.1), 0.7, 500, 0.5
ADAM = {"generator": {"lr": 1e-2, "beta2": 0.9, "eps": 1e-5, "warmup": 4},
        "fake_score": {"lr": 2e-2, "beta2": 0.99, "eps": 3e-5, "decay": 8}}
RATES = {"generator": [1e-2 * 1 / 4, 1e-2 * 2 / 4], "fake_score": [2e-2 * 2 / 8, 2e-2 * 1 / 8]}
HALF_LIFE, BATCH = 6, 4


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Of v prediction, with a VAE of an unusual scaling factor."""
    folder = write_tiny_teacher(tmp_path_factory.mktemp("wiring") / "teacher", "v_prediction", unet_blocks=NO_MIDDLE)
    edit("vae/config.json", scaling_factor=FACTOR)(folder)
    return folder


@pytest.fixture(scope="module")
def config(teacher):
    """config(folder, **changes) -> the path of a configuration; changes: {section: values}."""

    def write(folder, **changes):
        values = {"model": {"teacher": str(teacher)}, "data": {"prompts": "shapes:train"},
                  "train": {"steps": 2, "batch_size": BATCH, "micro_batch": 2, "log_every": 1, "save_every": 1,
                            "keep": 9, "samples": 2},
                  "guidance": {f"kappa{i}": kappa for i, kappa in enumerate(KAPPAS, 1)} | {"prompt_dropout": 0.5},
                  "loss": {"alpha": ALPHA}, "noise": {"t_init": T_INIT}, "optimizer": ADAM,
                  "ema": {"half_life": HALF_LIFE, "ramp_up": 10}}
        for section, more in changes.items():
            values[section] = values.get(section, {}) | more
        path = folder / "config.json"
        path.write_text(json.dumps(values))
        return path

    return write


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """(run directory, its Loop)."""
    folder = tmp_path_factory.mktemp("run")
    return folder / "run", train_here(config(folder), folder / "run")


def tensors(out, step, network, kind):
    return read_tensors(out / "checkpoints" / f"step-{step:08d}", network, kind)


def unet_of(teacher, weights=None, dtype=torch.float64):
    unet = UNet2DConditionModel.from_pretrained(teacher, subfolder="unet")
    unet.load_state_dict(weights or unet.state_dict())
    return unet.to(dtype).eval()


def whole(micro_batches):
    """One batch in float64 out of a process's micro-batches."""
    first = micro_batches[0]
    others = (torch.cat(parts) for parts in zip(*(b[2:] for b in micro_batches), strict=True))
    return in_float64(Batch(cat([b.cond for b in micro_batches]), first.uncond, *others))


def test_losses_of_the_first_step(run, teacher):
    """The mean over the global batch of eqs. 5 and 8; the generator's turn is the second."""
    out, loop = run
    objective = objective_of(*KAPPAS, ALPHA, "v_prediction", T_INIT)
    first, second = (whole(loop.state.batches(0, name)) for name in ("fake_score", "generator"))
    start, trained = unet_of(teacher), unet_of(teacher, tensors(out, 1, "fake_score", "weights"))
    fake, _ = naive_fake_score_update((start, start, start), first, objective)
    generator, _ = naive_generator_update((start, trained, start), second, objective)
    assert losses(out)[0][1:] == pytest.approx((fake.item(), generator.item()), rel=1e-4)


def test_settings_of_the_optimizers(run):
    out, loop = run
    for name, adam in ADAM.items():
        [group] = loop.state.engines[name].basic_optimizer.param_groups
        assert (group["betas"], group["eps"]) == ((0.0, adam["beta2"]), adam["eps"]), name
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for name, rates in RATES.items():                    # warm-up of the one, decay of the other
        assert [line[f"learning_rate/{name}"] for line in lines] == pytest.approx(rates), name


def test_average_with_a_half_life(run, teacher):
    """0.5^(batch / half-life) once the ramp-up is beyond it, which is from the first step here."""
    out, _ = run
    average, decay = unet_of(teacher).state_dict(), 0.5 ** (BATCH / HALF_LIFE)
    for step in (1, 2):
        weights = tensors(out, step, "generator", "weights")
        average = {name: decay * value + (1 - decay) * weights[name] for name, value in average.items()}
    got = tensors(out, 2, "generator", "ema")
    assert_close("average", *(torch.cat([v[name].flatten() for name in average]) for v in (got, average)), bound=1e-6)


@torch.no_grad()
def image_of(teacher, unet, prompt, seed):
    """Eq. 4 and the VAE in float64, [3, H, W] in [0, 1], by plain transformers and diffusers."""
    tokenizer = AutoTokenizer.from_pretrained(teacher / "tokenizer")
    ids = tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
    text = CLIPTextModel.from_pretrained(teacher / "text_encoder").to(unet.dtype)(ids).last_hidden_state
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)).to(unet.dtype)
    x = naive_generate(unet, z[0], text[0], objective_of(prediction_type="v_prediction", t_init=T_INIT))
    image = AutoencoderKL.from_pretrained(teacher / "vae").to(unet.dtype).decode(x[None] / FACTOR).sample[0]
    return (image / 2 + 0.5).clamp(0, 1)


def test_image_of_the_export(run, teacher):
    """Of the average, in fp16, at the run's timestep: by the code that travels with it, in plain diffusers."""
    out, _ = run
    export = DiffusionPipeline.from_pretrained(out / "export", trust_remote_code=True, low_cpu_mem_usage=False)
    export.set_progress_bar_config(disable=True)
    got = export("a red circle", generator=torch.Generator().manual_seed(5), output_type="pt").images[0]
    halves = {name: value.half().double() for name, value in tensors(out, 2, "generator", "ema").items()}
    want = image_of(out / "export", unet_of(teacher, halves), "a red circle", 5)
    assert_close("image", got, want, 1e-5)
    raw = unet_of(teacher, tensors(out, 2, "generator", "weights"))
    assert (image_of(out / "export", raw, "a red circle", 5) - want).norm() > 1e-3 * want.norm()


def test_grid_of_a_run(run, teacher):
    """Held-out captions, and images of the average: those of its pipeline, to 8 bits; above them the teacher's."""
    out, _ = run
    prompts, rows = read_grid(out / "samples" / "step-00000002.png")
    assert len(prompts) == 2 and shapes.is_held_out(shapes.parse_captions(prompts)).all()
    pipe = StableDiffusionPipeline.from_pretrained(teacher, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    unet = unet_of(teacher, tensors(out, 2, "generator", "ema"))
    for seed, prompt in enumerate(prompts):
        want = {"student after 2 updates, 1 step": image_of(teacher, unet, prompt, seed),
                "student at start, 1 step": image_of(teacher, unet_of(teacher), prompt, seed),
                "teacher, 50 steps, guidance 3.1": pipe(
                    prompt, num_inference_steps=50, guidance_scale=KAPPAS[3], output_type="pt",
                    generator=torch.Generator().manual_seed(seed)).images[0]}
        assert rows.keys() == want.keys()
        for label, image in want.items():
            pixels = torch.from_numpy(np.array(rows[label][seed])).permute(2, 0, 1)
            assert (pixels - 255 * image).abs().max() < 0.51, label


def test_timesteps_of_the_teacher(teacher, tmp_path):
    """Stable Diffusion's, as diffusers corrects an offset of 0; where the last step ends is the scheduler's own."""
    folder = shutil.copytree(teacher, tmp_path / "teacher")
    edit("scheduler/scheduler_config.json", steps_offset=0, set_alpha_to_one=True)(folder)
    sampler = load_teacher(str(folder)).sampler()
    sampler.set_timesteps(50)
    assert sampler.timesteps.tolist() == list(range(981, 0, -20))
    assert sampler.final_alpha_cumprod == 1
    assert load_teacher(str(teacher)).sampler().final_alpha_cumprod == sampler.alphas_cumprod[0] < 1


def test_export_of_a_checkpoint(run, teacher, tmp_path):
    """`sidfast export` writes the average of a checkpoint, and our own loader makes the same image of it."""
    out, _ = run
    for step in (1, 2):
        export, checkpoint = tmp_path / f"export-{step}", out / "checkpoints" / f"step-{step:08d}"
        name = str(checkpoint) if step == 1 else checkpoint.name                 # (the run's own folder is looked in)
        assert cli.main(["export", "--run", str(out), "--checkpoint", name, "--out", str(export)]) == 0
        pipe, _ = load_pipeline(export, torch.device("cpu"))
        got = pipe("x", generator=torch.Generator().manual_seed(2), output_type="pt").images[0]
        halves = {name: value.half().double() for name, value in tensors(out, step, "generator", "ema").items()}
        assert_close(f"step {step}", got, image_of(export, unet_of(teacher, halves), "x", 2), 1e-5)


@pytest.mark.parametrize("kappas, dropped", [((1, 1, 1), 0.0), ((1, 1, 2), 0.5)], ids=str)
def test_prompts_are_dropped_where_the_null_text_is_read(config, tmp_path, kappas, dropped):
    guidance = dict(zip(("kappa1", "kappa2", "kappa3"), kappas, strict=True))
    loop = train_here(config(tmp_path, guidance=guidance, train={"steps": 1, "save_every": 0, "samples": 0}),
                      tmp_path / "run")
    shares = [b.dropped.float().mean().item() for step in range(50) for b in loop.state.batches(step, "fake_score")]
    assert np.mean(shares) == pytest.approx(dropped, abs=0.15 if dropped else 0)


class KeptConv(Prepacked, nn.Conv2d):
    """Reads a copy of its weight that `refresh` makes, as fused modules do; gradients come to the weight itself."""

    def prepack(self):
        return (self.weight.clone(),)

    def forward(self, x):
        return self._conv_forward(x, self.cache[0] + self.weight - self.weight.detach(), self.bias)


def test_prepacked_weights_are_those_of_every_step(config, tmp_path):
    """Also those of the average, which draws the fake score's images here."""
    decide = trainer.resolve_acceleration

    def prepare(self, unet):
        unet.conv_in.__class__ = KeptConv
        return unet

    patches = [(trainer, "resolve_acceleration", lambda *args: dataclasses.replace(decide(*args), packed=True)),
               (Speed, "prepare", prepare)]
    curves = []
    for name, kept in (("plain", []), ("packed", patches)):
        (tmp_path / name).mkdir()
        path = config(tmp_path / name, train={"steps": 3, "save_every": 0, "samples": 0}, synthetic={"source": "ema"})
        loop = train_here(path, tmp_path / name / "run", patches=kept)
        assert loop.state.speed.packed is bool(kept)
        curves.append(losses(tmp_path / name / "run"))
    assert len(curves[0]) == 3
    for want, got in zip(*curves, strict=True):
        assert got == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("synthetic, step, kind", [({"source": "ema"}, 2, "ema"),
                                                   ({"source": "stale", "stale_by": 1}, 1, "weights")], ids=str)
def test_copies_that_draw_images(config, tmp_path, synthetic, step, kind):
    """In the third step: the average after two, and the generator as it was one update before."""
    loop = train_here(config(tmp_path, synthetic=synthetic, train={"steps": 3, "samples": 0}), tmp_path / "run")
    [copy] = loop.state.copies
    want, got = tensors(tmp_path / "run", step, "generator", kind), dict(copy.network.named_parameters())
    assert got.keys() == want.keys() and all(torch.equal(got[name], value) for name, value in want.items())


@pytest.mark.parametrize("name, size", [("fake_score", 4), ("generator", 2)])
def test_passes_of_a_factor(config, tmp_path, name, size):
    """train.fake_score_factor is the fake score's alone."""
    values = build_config(json.loads(config(tmp_path, train={"fake_score_factor": 2}).read_text()), "test")
    assert values.train.images_at_once(name) == size
