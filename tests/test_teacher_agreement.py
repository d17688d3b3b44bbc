"""Training, exports and the teacher's own images agree with StableDiffusionPipeline of diffusers, flag by flag."""

import json
import shutil

import pytest
import torch
from conftest import ROOT
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline
from helpers_input import edit, fails

from sidfast import cli, train
from sidfast.common.errors import UserError
from sidfast.config.schema import load_config
from sidfast.method.densities import DENSITIES, NoiseLevels
from sidfast.method.generator import generate
from sidfast.method.synthetic import Source, TeacherShare
from sidfast.method.updates import Batch, Objective
from sidfast.publishing.export import write_export
from sidfast.publishing.load import load_pipeline
from sidfast.teachers.fingerprint import fingerprint
from sidfast.teachers.fit import check_teacher_fits
from sidfast.teachers.load import load_teacher
from sidfast.teachers.schedulers import check_steps
from sidfast.training.batches import TextEncoder

TEXT = "encoder_hidden_states"
PROMPTS = ["a small red circle", "", "a large blue square above a small green cross on a white background"]
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.fixture
def folder(tiny_teacher, tmp_path):
    return shutil.copytree(tiny_teacher, tmp_path / "teacher")


def in_diffusers(folder):
    """Diffusers' own pipeline of a folder, on DDIM."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False,
                                                   torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embed(teacher):
    encoder = TextEncoder(teacher, torch.float32)
    return encoder(encoder.tokenize(PROMPTS)), encoder.uncond


TEXT_FLAGS = {"plain": {}, "mask": {"use_attention_mask": True}, "tuples": {"return_dict": False},
              "states": {"output_hidden_states": True}}


@pytest.mark.parametrize("flags", TEXT_FLAGS.values(), ids=TEXT_FLAGS)
def test_texts(folder, tmp_path, flags):
    edit("text_encoder/config.json", **flags)(folder)
    teacher = load_teacher(folder)
    embeddings, null = embed(teacher)
    want, want_null = in_diffusers(folder).encode_prompt(PROMPTS, "cpu", 1, True)
    torch.testing.assert_close(embeddings[TEXT], want)
    torch.testing.assert_close(null[TEXT], want_null[:1])
    write_export(teacher.one_step_pipeline(teacher.network, 625), tmp_path / "export", torch.float32)
    export = DiffusionPipeline.from_pretrained(tmp_path / "export", trust_remote_code=True)
    torch.testing.assert_close(export.encode_prompt(PROMPTS)[0], want)
    ours, _ = load_pipeline(tmp_path / "export", torch.device("cpu"))
    torch.testing.assert_close(ours.encode_prompt(PROMPTS)[0], want)


def test_the_mask_matters(folder):
    without = embed(load_teacher(folder))[0][TEXT]
    edit("text_encoder/config.json", use_attention_mask=True)(folder)
    assert (embed(load_teacher(folder))[0][TEXT] - without).abs().max() > 0.05


def test_a_whole_clip_as_text_encoder(tmp_path):
    teacher, clip = (shutil.copytree(ROOT / "assets" / name, tmp_path / name) for name in ("teacher", "clip"))
    for name in ("model.safetensors", "config.json"):
        shutil.copy(clip / name, teacher / "text_encoder" / name)
    embeddings, _ = embed(load_teacher(teacher))
    torch.testing.assert_close(embeddings[TEXT], in_diffusers(teacher).encode_prompt(PROMPTS, "cpu", 1, False)[0])


SCHEDULERS = {
    "clip": {"clip_sample": True}, "alpha": {"set_alpha_to_one": True}, "default-alpha": {"set_alpha_to_one": None},
    "offset": {"steps_offset": 0}, "trailing": {"timestep_spacing": "trailing"},
    "linspace": {"timestep_spacing": "linspace"}, "threshold": {"thresholding": True, "sample_max_value": 1.5},
    "betas": {"trained_betas": [0.0001 + 0.00001 * n for n in range(1000)]},
    "zero-snr-v": ZERO_SNR | {"prediction_type": "v_prediction"}}


class Nothing(Source):
    """Images that are all replaced."""

    def __call__(self, batch):
        return torch.zeros_like(batch.z)


@pytest.mark.parametrize("flags", SCHEDULERS.values(), ids=SCHEDULERS)
def test_images_of_the_teacher(folder, flags):
    """In the grids of a run, and those that train the fake score."""
    path = folder / "scheduler" / "scheduler_config.json"
    values = json.loads(path.read_text()) | flags
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    teacher = load_teacher(folder)
    z = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pipe = in_diffusers(folder)
    options = {"num_inference_steps": 4, "guidance_scale": 1.5, "output_type": "latent"}
    want = pipe(PROMPTS, latents=z, **options).images
    assert want.isfinite().all()
    shown = teacher.pipeline()
    shown.set_progress_bar_config(disable=True)
    torch.testing.assert_close(shown(PROMPTS, latents=z, **options).images, want)
    text, null = embed(teacher)
    batch = Batch(text, null, z, None, None, None, torch.zeros(3, 0, 4, 8, 8), torch.zeros(3))
    source = TeacherShare(Nothing(None, None), teacher.network, teacher.family.predict, teacher.sampler(), 1.0, 4, 1.5)
    torch.testing.assert_close(source(batch), want)


@pytest.mark.parametrize("asked, stored", [("v_prediction", "epsilon"), ("epsilon", "v_prediction"), (None, "epsilon")])
def test_what_the_network_predicts(folder, tmp_path, asked, stored):
    """In place of what scheduler_config.json says: in the loss, the fingerprint, the export, the teacher's images."""
    edit("scheduler/scheduler_config.json", prediction_type=stored)(folder)
    teacher, predicted = load_teacher(folder, scheduler=asked and {"prediction_type": asked}), asked or stored
    assert teacher.schedule.prediction_type == teacher.sampler().config.prediction_type == predicted
    assert (fingerprint(teacher) == fingerprint(load_teacher(folder))) == (predicted == stored)
    write_export(teacher.one_step_pipeline(teacher.network, 625), tmp_path / "export", torch.float32)
    export = DiffusionPipeline.from_pretrained(tmp_path / "export", trust_remote_code=True)
    assert DDIMScheduler.from_pretrained(tmp_path / "export" / "scheduler").config.prediction_type == predicted
    z = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text, _ = embed(teacher)
    objective = Objective(teacher.schedule, teacher.family.predict, 1.5, 1.5, 1.5, 1.5)
    with torch.no_grad():
        torch.testing.assert_close(export.denoise(z, text[TEXT]), generate(teacher.network, z, text, objective))


@pytest.mark.parametrize("settings, key", [
    (["noise.t_init=999"], "noise.t_init (999)"), (["noise.t_max=999"], "noise.t_max (999)"),
    (["noise.generator.t_max=999"], "noise.generator.t_max (999)"), (["train.samples=2"], "train.samples"),
    (["synthetic.teacher_share=0.5"], "synthetic.teacher_share"),
], ids=["init", "max", "one", "samples", "share"])
def test_epsilon_where_there_is_no_signal(capsys, write_config, folder, tmp_path, settings, key):
    edit("scheduler/scheduler_config.json", **ZERO_SNR)(folder)
    options = [word for setting in settings for word in ("--set", setting)]
    config = write_config(**{"model.teacher": str(folder)})
    for command in ((train.main, "--out", tmp_path / "run"), (cli.main, "plan")):
        line = fails(capsys, *command, "--config", config, *options)
        assert key in line and "without any signal" in line and "model.scheduler.prediction_type" in line
    assert not (tmp_path / "run").exists()
    both = load_config(config, [*settings, "model.scheduler.prediction_type=v_prediction"])
    check_teacher_fits(both, load_teacher(folder, **both.model.loading), "config")


def test_thresholding_that_does_not_work(capsys, write_config, folder, tmp_path):
    edit("scheduler/scheduler_config.json", thresholding=True, dynamic_thresholding_ratio=2)(folder)
    config = write_config(**{"model.teacher": str(folder), "train.samples": 1})
    for command in ((train.main, "--out", tmp_path / "run"), (cli.main, "plan")):
        line = fails(capsys, *command, "--config", config)
        assert "train.samples: the scheduler's thresholding does not work (quantile() q must be" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("density", sorted(DENSITIES))
def test_levels_up_to_no_signal(folder, density):
    """With v prediction the last level can be drawn, by every density that has an end."""
    edit("scheduler/scheduler_config.json", **ZERO_SNR | {"prediction_type": "v_prediction"})(folder)
    schedule = load_teacher(folder).schedule
    if density == "karras":
        with pytest.raises(ValueError, match="needs a finite range"):
            NoiseLevels(schedule, density, 20, 999)
        return
    t = NoiseLevels(schedule, density, 20, 999).sample(10_000, torch.Generator().manual_seed(0))
    a, s = schedule.coefficients(t)
    assert t.min() >= 20 and t.max() <= 999 and a.isfinite().all() and s.isfinite().all()
    assert density != "ddpm" or ((t == 999).any() and a.min() == 0)


def test_sampling_where_there_is_no_signal(capsys, folder, tmp_path):
    edit("scheduler/scheduler_config.json", **ZERO_SNR)(folder)
    line = fails(capsys, cli.main, "sample", "--model", folder, "--prompt", "x", "--steps", "3", "--out",
                 tmp_path / "x.png")
    assert "without any signal" in line and not (tmp_path / "x.png").exists()
    edit("scheduler/scheduler_config.json", timestep_spacing="leading")(folder)
    check_steps(in_diffusers(folder).scheduler, 50, "x")
    with pytest.raises(UserError, match="1000 steps begin at timestep 1000"):
        check_steps(in_diffusers(folder).scheduler, 1000, "x")
