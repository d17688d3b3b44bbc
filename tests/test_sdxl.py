"""Stable Diffusion XL: texts, sizes, training, exports and images as diffusers has them, on a small random one."""

import copy
import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import process_alone
from diffusers import StableDiffusionXLPipeline
from helpers_input import edit, fails

from sidfast import cli, train
from sidfast.common.records import read_metrics
from sidfast.method.generator import generate
from sidfast.method.updates import Objective
from sidfast.publishing.load import load_pipeline
from sidfast.teachers.families import ARCHITECTURES
from sidfast.teachers.fingerprint import describe_teacher
from sidfast.teachers.load import load_meta_teacher, load_teacher
from sidfast.training.batches import TextEncoder

PROMPTS = ["a red circle", "two large blue squares on a white background"]
SIZE = (64, 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random teacher, whose files are in fp16."""
    folder = tmp_path_factory.mktemp("sdxl") / "teacher"
    assert cli.main(["random-teacher", "--architecture", "sdxl-tiny", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def teacher(folder):
    return load_teacher(folder)


def in_diffusers(folder):
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("zeros", [True, False])
def test_texts_and_sizes(folder, tmp_path, zeros):
    """Those of StableDiffusionXLPipeline, with its zeros for no text, or without."""
    shutil.copytree(folder, tmp_path / "teacher")
    edit("model_index.json", force_zeros_for_empty_prompt=zeros)(tmp_path / "teacher")
    teacher, pipe = load_teacher(tmp_path / "teacher"), in_diffusers(tmp_path / "teacher")
    with torch.no_grad():
        states, null, pooled, null_pooled = pipe.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=True)
    encoder = TextEncoder(teacher, torch.float32)
    cond, uncond = encoder(encoder.tokenize(PROMPTS)), encoder.uncond
    for got, want in ((cond["encoder_hidden_states"], states), (cond["text_embeds"], pooled),
                      (uncond["encoder_hidden_states"], null[:1]), (uncond["text_embeds"], null_pooled[:1])):
        torch.testing.assert_close(got, want)
    ids = pipe._get_add_time_ids(SIZE, (0, 0), SIZE, torch.float32, pipe.text_encoder_2.config.projection_dim)
    assert torch.equal(cond["time_ids"], ids.expand(2, 6)) and torch.equal(uncond["time_ids"], ids)
    assert (uncond["encoder_hidden_states"] == 0).all() == zeros
    assert {k: v.shape for k, v in teacher.conditions(2).items()} == {k: v.shape for k, v in cond.items()}


def test_images_of_the_teacher(folder, teacher):
    options = {"guidance_scale": 3.0, "num_inference_steps": 2, "output_type": "np"}
    ours, theirs = (pipe(PROMPTS, generator=torch.Generator().manual_seed(0), **options).images
                    for pipe in (teacher.pipeline(), in_diffusers(folder)))
    assert abs(ours - theirs).max() < 1e-5 and ours.std() > 0.01


def test_training(folder, monkeypatch, write_config, tmp_path, capsys):
    """A run with samples, its resumption, and an export that is the trainer's generator, also without this package."""
    process_alone(monkeypatch)
    config = write_config(**{"model.teacher": str(folder), "train.steps": 4, "train.save_every": 2, "train.samples": 1,
                             "guidance": {f"kappa{k}": 1.5 for k in range(1, 5)}})
    run = tmp_path / "run"
    for steps in (2, 4):
        assert train.main(["--config", str(config), "--out", str(run), "--set", f"train.steps={steps}"]) == 0
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3, 4]
    assert cli.main(["export", "--run", str(run), "--out", str(tmp_path / "export"), "--dtype", "fp32"]) == 0
    assert cli.main(["export", "--run", str(run), "--out", str(tmp_path / "plain"), "--dtype", "fp32", "--plain"]) == 0
    capsys.readouterr()
    line = fails(capsys, cli.main, "export", "--run", run, "--out", tmp_path / "x.safetensors", "--single-file")
    assert "a second text encoder (Stable Diffusion XL)" in line
    pipe, one_step = load_pipeline(tmp_path / "export", "cpu")
    teacher, z = load_teacher(folder), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    encoder = TextEncoder(teacher, torch.float32)
    objective = Objective(teacher.schedule, teacher.family.predict, 1.5, 1.5, 1.5, 1.5)
    with torch.no_grad():
        want = generate(pipe.unet, z, encoder(encoder.tokenize(PROMPTS)), objective)
    got = pipe(PROMPTS, latents=z, output_type="latent").images
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert one_step and not torch.allclose(pipe.unet.conv_in.weight, teacher.network.conv_in.weight)
    start = json.loads((tmp_path / "plain" / "distillation.json").read_text())["plain"]
    plain, options = in_diffusers(tmp_path / "plain"), {"timesteps": [start["t_init"]], "guidance_scale": 0}
    images = plain(PROMPTS, latents=start["noise_scale"] * z, output_type="pt", **options).images
    assert (images - pipe(PROMPTS, latents=z, output_type="pt").images).abs().max() < 1e-6 and images.std() > 0.01
    plain.save_pretrained(tmp_path / "again")
    again = in_diffusers(tmp_path / "again")(PROMPTS, latents=start["noise_scale"] * z, output_type="pt", **options)
    assert torch.equal(again.images, images)
    monkeypatch.setattr(f"{StableDiffusionXLPipeline.__module__}.is_invisible_watermark_available", lambda: True)
    assert StableDiffusionXLPipeline.from_pretrained(tmp_path / "plain").watermark is None
    torch.save((z, got), tmp_path / "want.pt")
    script = ("import sys, torch; sys.modules['sidfast'] = None; from diffusers import DiffusionPipeline; "
              "pipe = DiffusionPipeline.from_pretrained('export', trust_remote_code=True); "
              "z, want = torch.load('want.pt'); pipe.save_pretrained('copy'); "
              "copy = DiffusionPipeline.from_pretrained('copy', trust_remote_code=True); "
              f"images = [p({PROMPTS!r}, latents=z, output_type='latent').images for p in (pipe, copy)]; "
              "assert all((i - want).abs().max() < 1e-4 for i in images); "
              "assert pipe('a', output_type='np').images.std() > 0.01")
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("change, words", [
    (edit("unet/config.json", addition_embed_type=None), "does not take sizes and a pooled text"),
    (edit("unet/config.json", projection_class_embeddings_input_dim=99), "sizes of 99 values"),
    (edit("unet/config.json", cross_attention_dim=16), "text_encoder and text_encoder_2 give 32"),
    (edit("model_index.json", text_encoder_2=["transformers", "CLIPTextModel"]), "write CLIPTextModelWithProjection"),
    (edit("model_index.json", tokenizer_2=[None, None]), "has no tokenizer_2"),
], ids=["no-sizes", "pooled-width", "text-width", "class", "tokenizer"])
def test_parts_that_do_not_fit(capsys, folder, tmp_path, write_config, change, words):
    shutil.copytree(folder, tmp_path / "teacher")
    change(tmp_path / "teacher")
    config = write_config(**{"model.teacher": str(tmp_path / "teacher")})
    assert words in fails(capsys, train.main, "--config", config, "--out", tmp_path / "run")


def test_a_vae_that_overflows_in_half_precision_decodes_in_single(teacher):
    pipe, seen = teacher.one_step_pipeline(copy.deepcopy(teacher.network), 625), []
    pipe.vae = copy.deepcopy(pipe.vae).half()
    decode = pipe.vae.decode
    pipe.vae.decode = lambda latents, **options: seen.append(latents.dtype) or decode(latents, **options)
    pipe("a", output_type="np")
    pipe.vae.register_to_config(force_upcast=False)
    pipe("a", output_type="np")
    assert seen == [torch.float32, torch.float16] and pipe.vae.dtype == torch.float16


def test_its_real_size():
    teacher = load_meta_teacher("sdxl")
    assert teacher.family is ARCHITECTURES["sdxl"] and teacher.image_size() == (1024, 1024)
    assert {name: round(count / 1e6) for name, count in teacher.parameters().items()} == {
        "unet": 2567, "vae": 84, "text_encoder": 123, "text_encoder_2": 695}


def test_another_second_encoder_is_noticed(folder, teacher):
    changed = load_teacher(folder)
    with torch.no_grad():
        changed.parts["text_encoder_2"].text_projection.weight[0] += 1
    before, after = json.dumps(describe_teacher(teacher)), json.dumps(describe_teacher(changed))
    assert before != after and "text_encoder_2" in before
