"""Pipelines of diffusers as `sample` and `evaluate` load them: the images are those of their networks, whatever the
folder brings around these, and a folder of another task is refused in a line."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.pipelines.stable_diffusion_xl import pipeline_stable_diffusion_xl
from helpers_evaluate import ASSETS
from helpers_input import edit, fails
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sidfast import cli
from sidfast.common.errors import UserError
from sidfast.config.schema import load_config
from sidfast.publishing.generate import make_images
from sidfast.publishing.load import load_pipeline, loading_notes, sampler_options
from sidfast.publishing.pipeline_class import text_to_image_class
from sidfast.runs import preview as preview_module
from sidfast.teachers.load import load_teacher

TEXT = "a small red circle"


@pytest.fixture
def folder(tiny_teacher, tmp_path):
    return shutil.copytree(tiny_teacher, tmp_path / "model")


@pytest.fixture(scope="module")
def plain(tiny_teacher):
    """The pipeline's own image of TEXT, [1, 3, H, W], with seed 3 in two steps."""
    pipe = DiffusionPipeline.from_pretrained(tiny_teacher, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe(TEXT, generator=torch.Generator().manual_seed(3), num_inference_steps=2, guidance_scale=1.5,
                output_type="pt").images


def sample(model, out, *more):
    """The exit code of a command that makes the image of `plain`, as a file that has a label around it."""
    return cli.main([str(x) for x in ("sample", "--model", model, "--prompt", TEXT, "--seed", 3, "--steps", 2, "--out",
                                      out, *more)])


def tile(path):
    """The image in a grid of one, which is enlarged there to 128 pixels a side."""
    picture = Image.open(path).convert("RGB")
    return picture.crop((120, picture.height - 134, 248, picture.height - 6)).resize((16, 16), Image.Resampling.NEAREST)


def pil(images):
    return Image.fromarray((images[0].permute(1, 2, 0) * 255).round().byte().numpy())


def flag_everything(folder):
    """Add a safety checker that blackens every image."""
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    checker = StableDiffusionSafetyChecker(CLIPConfig(
        text_config=tower | {"vocab_size": 50, "projection_dim": 8},
        vision_config=tower | {"image_size": 32, "patch_size": 16, "projection_dim": 8}, projection_dim=8))
    checker.concept_embeds_weights.data.fill_(-10)
    checker.special_care_embeds_weights.data.fill_(-10)
    checker.save_pretrained(folder / "safety_checker")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder / "feature_extractor")
    edit("model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
         feature_extractor=["transformers", "CLIPImageProcessor"], requires_safety_checker=True)(folder)


def pickled(folder):
    weights = folder / "safety_checker" / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()


def test_the_safety_checker_works(folder):
    """Otherwise the tests here would show nothing."""
    flag_everything(folder)
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert not pipe(TEXT, num_inference_steps=1, output_type="pt").images.any()


@pytest.mark.parametrize("damage", [
    lambda f: None, pickled, lambda f: shutil.rmtree(f / "safety_checker"), edit("safety_checker/config.json", a=[1]),
    lambda f: (f / "safety_checker" / "config.json").write_text("[]"), lambda f: shutil.rmtree(f / "feature_extractor"),
], ids=["whole", "pickle", "missing", "odd", "broken", "no-extractor"])
def test_images_are_those_without_a_safety_checker(folder, plain, tmp_path, capsys, damage):
    flag_everything(folder)
    damage(folder)
    assert sample(folder, tmp_path / "x.png") == 0
    said = capsys.readouterr().err.strip()
    assert said == f"sidfast: --model {folder}: used without its feature_extractor, safety_checker"
    assert tile(tmp_path / "x.png").tobytes() == pil(plain).tobytes()


def test_the_result_of_evaluate_says_so(folder, tmp_path):
    """The score is that of the model without its checker; the scheduler is named too."""
    flag_everything(folder)
    edit("model_index.json", _class_name="StableDiffusionImg2ImgPipeline",
         scheduler=["diffusers", "PNDMScheduler"])(folder)
    results = {}
    (tmp_path / "p.txt").write_text(f"{TEXT}\n" * 2)
    for name in ("with", "without"):
        args = ["evaluate", "--model", folder, "--prompts", tmp_path / "p.txt", "--metrics", "clip", "--steps", 4,
                "--clip", ASSETS / "clip", "--out", tmp_path / f"{name}.json"]
        assert cli.main([str(a) for a in args]) == 0
        results[name] = json.loads((tmp_path / f"{name}.json").read_text())
        edit("model_index.json", safety_checker=[None, None], feature_extractor=[None, None],
             _class_name="StableDiffusionPipeline")(folder)
    model, other = results["with"]["model"], results["without"]["model"]
    assert model["left_out"] == ["feature_extractor", "safety_checker"] and other["left_out"] == []
    assert model["saved_as"] == "StableDiffusionImg2ImgPipeline" and "saved_as" not in other
    assert model["pipeline"] == other["pipeline"] == "StableDiffusionPipeline" and model["scheduler"] == "PNDMScheduler"
    assert results["with"]["metrics"] == results["without"]["metrics"]


@pytest.mark.parametrize("name", ["StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"])
def test_a_folder_saved_for_another_task(folder, plain, tmp_path, capsys, name):
    """The parts are those of a text-to-image model."""
    edit("model_index.json", _class_name=name)(folder)
    assert sample(folder, tmp_path / "x.png") == 0
    assert capsys.readouterr().err.strip() == f"sidfast: --model {folder}: saved by a {name}, used for text to image"
    assert tile(tmp_path / "x.png").tobytes() == pil(plain).tobytes()


@pytest.mark.parametrize("name, words", [
    ("StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLPipeline"), ("FluxInpaintPipeline", "FluxPipeline"),
    ("StableDiffusion3Pipeline", "StableDiffusion3Pipeline"), ("FluxKontextPipeline", "FluxKontextPipeline"),
    ("StableDiffusionSAGPipeline", "StableDiffusionSAGPipeline")])
def test_classes_for_text(tmp_path, name, words):
    assert text_to_image_class(name, tmp_path, "--model X").__name__ == words


@pytest.mark.parametrize("name, words", [
    ("StableDiffusionDepth2ImgPipeline", "works with image"), ("StableDiffusionUpscalePipeline", "works with image"),
    ("StableDiffusionInstructPix2PixPipeline", "works with image"), ("TextToVideoSDPipeline", "works with num_frames"),
    ("StableDiffusionControlNetPipeline", "works with image"), ("FluxControlPipeline", "works with control_image"),
    ("StableVideoDiffusionPipeline", "works with image"), ("AudioLDM2Pipeline", "works with audio_length_in_s"),
    ("DDPMPipeline", "takes no prompt"), ("DiTPipeline", "works with class_labels"),
    ("BlipDiffusionPipeline", "works with"), ("NoSuchPipeline", "not a pipeline of the diffusers"),
    ("UNet2DConditionModel", "not a pipeline of the diffusers"), ("__doc__", "not a pipeline of the diffusers")])
def test_classes_for_other_tasks(tmp_path, name, words):
    with pytest.raises(UserError, match=words):
        text_to_image_class(name, tmp_path, "--model X")


def other_unet(**changes):
    """damage(folder): another UNet of the same kind, with weights."""

    def damage(folder):
        config = UNet2DConditionModel.load_config(folder / "unet")
        UNet2DConditionModel.from_config(config, **changes).save_pretrained(folder / "unet")

    return damage


def other_text_encoder(folder):
    config = CLIPTextConfig.from_pretrained(folder / "text_encoder")
    config.hidden_size = 32
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")


def overflow(folder):
    """Weights that are finite, and what comes of them is not."""
    path = next((folder / "vae").glob("*.safetensors"))
    state = load_file(path)
    state["decoder.conv_in.weight"].fill_(3e38)
    save_file(state, path, {"format": "pt"})


def only_nan(folder):
    """What epsilon prediction gives where there is no signal at all."""
    edit("scheduler/scheduler_config.json", rescale_betas_zero_snr=True, timestep_spacing="trailing")(folder)


@pytest.mark.parametrize("damage, words", [
    (other_unet(in_channels=9), "unet takes 9 channels, its latents have 4"),
    (other_unet(class_embed_type="timestep"), "class_embed_type is 'timestep'"),
    (other_unet(encoder_hid_dim_type="image_proj", encoder_hid_dim=16), "encoder_hid_dim_type is 'image_proj'"),
    (edit("unet/config.json", cross_attention_dim=32), "describes another network than the weights"),
    (edit("model_index.json", unet=[None, None]), "cannot be loaded"),
    (edit("model_index.json", scheduler=["diffusers", "NoSuchScheduler"]), "NoSuchScheduler"),
    (edit("scheduler/scheduler_config.json", num_train_timesteps="many"), "cannot be loaded"),
    (edit("scheduler/scheduler_config.json", trained_betas=[0.1, 0.2, 0.3]), "take fewer steps"),
    (other_text_encoder, "its StableDiffusionPipeline cannot make an image of a prompt"),
    (overflow, "non-finite pixels"), (only_nan, "without any signal"),
    (edit("tokenizer/tokenizer_config.json", model_max_length=10**30), "tokens, its text encoder takes"),
    (lambda f: (f / "tokenizer" / "tokenizer.json").unlink(), "its files are not all there"),
    (lambda f: shutil.rmtree(f / "vae"), "has no folder vae, which its model_index.json names"),
    (edit("model_index.json", unet=["diffusers", "AutoencoderKL"]), "unet"),
    (edit("model_index.json", _class_name="StableDiffusionControlNetPipeline"), "works with image"),
    (edit("text_encoder/config.json", auto_map={"AutoModel": "evil.Evil"}), "auto_map"),
    (edit("unet/config.json", quantization_config={"quant_method": "bitsandbytes"}), "quantization_config"),
], ids=["inpainting", "class", "ip-adapter", "other-unet", "no-unet", "no-scheduler", "levels", "three-levels", "width",
        "overflow", "no-signal", "no-length", "vocabulary", "no-folder",
        "other-class", "controlnet", "code", "quantised"])
def test_models_that_are_refused(folder, tmp_path, capsys, damage, words):
    """One line, exit code 2, and no picture."""
    damage(folder)
    capsys.readouterr()
    line = fails(capsys, cli.main, "sample", "--model", folder, "--prompt", TEXT, "--steps", 2, "--out",
                 tmp_path / "x.png")
    assert words in line and str(folder) in line, line
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("extra", [False, True], ids=["alone", "next to others"])
def test_weights_in_a_variant(folder, plain, extra):
    """A folder whose weights have .fp16 in their names; plain ones next to them win."""
    for path in list(folder.glob("*/*.safetensors")):
        state = load_file(path)
        save_file({k: v.half() if v.is_floating_point() else v for k, v in state.items()},
                  path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")), {"format": "pt"})
        if not extra:
            path.unlink()
    pipe, _ = load_pipeline(folder, "cpu")
    pipe.set_progress_bar_config(disable=True)
    got = make_images(pipe, [TEXT], [3], num_inference_steps=2, guidance_scale=1.5)
    assert pipe.unet.dtype == torch.float32 and torch.equal(got, plain) == extra
    assert (got - plain).abs().max() < 0.02


@pytest.fixture(scope="module")
def xl(tiny_teacher, tmp_path_factory):
    """A small SDXL: two text encoders and a UNet that takes a pooled text and sizes."""
    parts = DiffusionPipeline.from_pretrained(tiny_teacher)
    torch.manual_seed(0)
    second = CLIPTextModelWithProjection(CLIPTextConfig(**parts.text_encoder.config.to_dict() | {"projection_dim": 16}))
    unet = UNet2DConditionModel.from_config(parts.unet.config, addition_embed_type="text_time", cross_attention_dim=32,
                                            addition_time_embed_dim=4, projection_class_embeddings_input_dim=16 + 6 * 4)
    target = tmp_path_factory.mktemp("xl") / "xl"
    StableDiffusionXLPipeline(parts.vae, parts.text_encoder, second, parts.tokenizer, parts.tokenizer, unet,
                              parts.scheduler, add_watermarker=False).save_pretrained(target)
    return target


class Watermark:
    """Nobody can miss it."""

    @staticmethod
    def apply_watermark(images):
        return images * 0


def test_sdxl(xl, tmp_path, monkeypatch):
    """Its images are diffusers' own, without the watermark that diffusers adds where the package for it is installed; a
    second tokenizer is checked like the first."""
    monkeypatch.setattr(pipeline_stable_diffusion_xl, "is_invisible_watermark_available", lambda: True)
    monkeypatch.setattr(pipeline_stable_diffusion_xl, "StableDiffusionXLWatermarker", Watermark, raising=False)
    theirs = StableDiffusionXLPipeline.from_pretrained(xl, add_watermarker=False)
    pipe, one_step = load_pipeline(xl, "cpu")
    for each in (theirs, pipe):
        each.set_progress_bar_config(disable=True)
    options = sampler_options(xl, pipe, one_step, 2, 3.0)
    want = theirs(TEXT, generator=torch.Generator().manual_seed(3), output_type="pt", **options).images
    assert torch.equal(make_images(pipe, [TEXT], [3], **options), want) and want.any()
    assert loading_notes(xl) == {}
    broken = shutil.copytree(xl, tmp_path / "broken")
    edit("tokenizer_2/tokenizer_config.json", model_max_length=77)(broken)
    with pytest.raises(UserError, match="tokenizer_2 gives up to 77 tokens, its text encoder takes 24"):
        load_pipeline(broken, "cpu")


@pytest.mark.parametrize("name, changes", [
    ("PNDMScheduler", {"skip_prk_steps": True}), ("DDIMScheduler", {"set_alpha_to_one": True}),
    ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"})], ids=["pndm", "ddim", "euler"])
def test_training_and_evaluate_sample_the_teacher_alike(folder, write_config, monkeypatch, name, changes):
    """The folder's own scheduler, the same steps, guidance and noise: the same bits."""
    monkeypatch.setattr(preview_module, "TEACHER_STEPS", 5)
    edit("model_index.json", scheduler=["diffusers", name])(folder)
    edit("scheduler/scheduler_config.json", _class_name=name, **changes)(folder)
    config = load_config(write_config(**{"model.teacher": str(folder), "train.samples": 1, "evaluation.images": 0,
                                         "data.prompts": "shapes:train"}))
    preview = preview_module.Preview(config, load_teacher(str(folder)), SimpleNamespace(sample=lambda *_: None), {})
    preview.begin(1)
    (label, images), *_ = preview._rows.items()
    assert "5 steps" in label
    pipe, one_step = load_pipeline(folder, "cpu")
    pipe.set_progress_bar_config(disable=True)
    options = sampler_options(folder, pipe, one_step, 5, config.guidance.kappa4)
    for n, image in enumerate(images):
        want = pil(make_images(pipe, [preview.prompts[n]], [n], **options))
        assert image.tobytes() == want.tobytes()


@pytest.mark.parametrize("steps, guidance, words", [
    (0, None, "--steps"), (-3, None, "--steps"), (1001, None, "at most 1000"), (None, float("nan"), "--guidance"),
    (None, float("inf"), "--guidance"), (None, -1.0, "--guidance"), (None, 1e9, "--guidance")])
def test_odd_numbers(tiny_teacher, steps, guidance, words):
    pipe, one_step = load_pipeline(tiny_teacher, "cpu")
    with pytest.raises(UserError, match=words):
        sampler_options(tiny_teacher, pipe, one_step, steps, guidance)
    assert sampler_options(tiny_teacher, pipe, False, 1, 0.0) == {"num_inference_steps": 1, "guidance_scale": 0.0}


def test_a_size_that_diffusers_overrides(folder):
    """StableDiffusionPipeline reads 64 where such an old UNet says less, and so does training."""
    edit("unet/config.json", _diffusers_version="0.6.0")(folder)
    assert load_pipeline(folder, "cpu")[0].unet.config.sample_size == 64
    assert load_teacher(str(folder)).network.config.sample_size == 64
