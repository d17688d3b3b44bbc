"""Teachers of other kinds, and parts that do not fit: train and plan refuse them in one line, by JSON files."""

import json
import os
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers_input import edit, fails
from safetensors.torch import load_file, save_file

from sidfast import cli, train
from sidfast.common.errors import UserError
from sidfast.teachers.load import load_meta_teacher, load_teacher


@pytest.fixture
def folder(tiny_teacher, tmp_path):
    return shutil.copytree(tiny_teacher, tmp_path / "teacher")


def index(**parts):
    return edit("model_index.json", **parts)


def unet(**changes):
    return edit("unet/config.json", **changes)


def vae(**changes):
    return edit("vae/config.json", **changes)


def text(**changes):
    return edit("text_encoder/config.json", **changes)


def scheduler(**changes):
    return edit("scheduler/scheduler_config.json", **changes)


OTHER = "describes another network than the weights next to it hold: "
REFUSED = {
    "unclip": (unet(class_embed_type="identity"), "unCLIP"),
    "noise-levels": (unet(num_class_embeds=1000), "num_class_embeds is 1000"),
    "sdxl": (unet(addition_embed_type="text_time"), "addition_embed_type is text_time"),
    "deepfloyd": (unet(addition_embed_type="text"), "addition_embed_type is text"),
    "ip-adapter": (unet(encoder_hid_dim_type="ip_image_proj", encoder_hid_dim=1024), "IP-Adapter"),
    "projected": (unet(encoder_hid_dim=4096), "encoder_hid_dim is 4096"),
    "lcm": (unet(time_cond_proj_dim=256), "a latent consistency model, which is a distilled student"),
    "gligen": (unet(attention_type="gated"), "GLIGEN"),
    "deaf": (unet(mid_block_type="UNetMidBlock2D"), "no cross-attention, so the text does not reach"),
    "fourier": (unet(time_embedding_type="fourier"), "time_embedding_type is fourier"),
    "dropout": (unet(dropout=0.1), "dropout is 0.1"),
    "inpainting": (unet(in_channels=9), "takes 9 channels and gives 4"),
    "learned-variance": (unet(out_channels=8), "takes 4 channels and gives 8"),
    "motion": (unet(_class_name="UNetMotionModel"), "is a UNetMotionModel"),
    "widths": (unet(cross_attention_dim=[16, 24]), "width [16, 24]"),
    "text-width": (unet(cross_attention_dim=24), "texts of width 24 (cross_attention_dim), its text_encoder gives 16"),
    "latents": (vae(latent_channels=16), "latents of 16 channels, its unet of 4"),
    "rgba": (vae(out_channels=4), "out_channels is 4"),
    "shift": (vae(shift_factor=0.1159), "shift_factor is 0.1159"),
    "normalised": (vae(latents_mean=[0.1] * 4, latents_std=[1.1] * 4), "latents_mean"),
    "tiny-vae": (vae(_class_name="AutoencoderTiny"), "is a AutoencoderTiny"),
    "t5": (text(model_type="t5"), "is a t5, not a CLIP"),
    "projection": (index(text_encoder=["transformers", "CLIPTextModelWithProjection"]), "write CLIPTextModel there"),
    "second-encoder": (index(text_encoder_2=["transformers", "CLIPTextModel"]), "has no folder text_encoder_2"),
    "controlnet": (index(controlnet=["diffusers", "ControlNetModel"]), "has a controlnet"),
    "prior": (index(prior=["diffusers", "PriorTransformer"]), "has a prior"),
    "part-elsewhere": (index(**{"../vae": ["diffusers", "AutoencoderKL"]}), "names a part '../vae'"),
    "long-text": (text(max_position_embeddings=12), "its text encoder takes 12"),
    "few-words": (text(vocab_size=100), "its text encoder 100"),
    "quantised": (unet(quantization_config={"quant_method": "bitsandbytes"}), "another library's code"),
    "code": (text(auto_map={"AutoModel": "evil.Evil"}), "code of its own (auto_map)"),
    "many-layers": (text(num_hidden_layers=10**7), "asks for 1e+07 layers (num_hidden_layers)"),
    "many-blocks": (unet(layers_per_block=[3000, 2], transformer_layers_per_block=2), "3000 layers"),
    "large": (unet(block_out_channels=[2**20]), OTHER),
    "wide": (text(intermediate_size=10**12), OTHER),
    "scheduler": (scheduler(_class_name="Evil"), "scheduler Evil is not supported"),
    "other-levels": (scheduler(_class_name="PNDMScheduler", rescale_betas_zero_snr=True),
                     "PNDMScheduler has other levels of noise"),
    "steps": (scheduler(num_train_timesteps=10**9), "num_train_timesteps must be a whole number up to 100000"),
    "steps-in-words": (scheduler(num_train_timesteps="1000"), "not '1000'"),
    "spacing": (scheduler(timestep_spacing="odd"), "scheduler_config.json cannot be loaded (odd is not supported"),
    "other-shapes": (unet(resnet_time_scale_shift="scale_shift"), OTHER),
    "groups": (vae(norm_num_groups=0), "vae cannot be loaded"),
    "factor": (vae(scaling_factor=10**12), "scaling_factor"),
    "other-file": (text(transformers_weights="../vae/x.safetensors"), "weights under another name"),
    "no-text": (edit("tokenizer/tokenizer_config.json", model_max_length=2), "gives up to 2 tokens"),
    "long-text-in-words": (edit("tokenizer/tokenizer_config.json", model_max_length="x"), "gives up to 'x' tokens"),
    "infinite": (unet(norm_eps=float("inf")), "norm_eps must be a finite number, not inf"),
    "betas": (scheduler(beta_schedule="laplace"), "cannot be loaded"),
}


@pytest.mark.parametrize("change, words", REFUSED.values(), ids=REFUSED)
def test_refused(capsys, write_config, folder, tmp_path, change, words):
    change(folder)
    config = write_config(**{"model.teacher": str(folder)})
    line = fails(capsys, train.main, "--config", config, "--out", tmp_path / "run")
    assert "model.teacher" in line and str(folder) in line and words in line
    assert not (tmp_path / "run").exists()
    assert fails(capsys, cli.main, "plan", "--config", config) == line


def test_what_is_not_a_config(folder):
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps({"_class_name": "UNet2DConditionModel", "x": "y" * 2**20}))
    with pytest.raises(UserError, match="larger than any configuration"):
        load_teacher(folder)
    path.unlink()
    os.mkfifo(path)                                      # whose reader would wait for ever
    with pytest.raises(UserError, match=r"config.json is not a file"):
        load_teacher(folder)


def test_whole_numbers_for_weights(folder):
    """Quantised by someone whose config.json does not say so; diffusers would load them as they are."""
    [path] = (folder / "unet").glob("*.safetensors")
    save_file({name: (50 * value).to(torch.int8) for name, value in load_file(path).items()}, path)
    for load in (load_teacher, load_meta_teacher):
        with pytest.raises(UserError, match="holds I8 numbers: quantised weights are not supported"):
            load(str(folder))


def test_more_words(folder):
    """Textual inversion: one vector for a token is loaded, of several only diffusers knows which belong together."""
    tokenizer, encoder = load_teacher(folder).parts["tokenizer"], load_teacher(folder).parts["text_encoder"]
    for token in ("<cat>", "<cat>_1"):
        tokenizer.add_tokens([token])
        encoder.resize_token_embeddings(len(tokenizer))
        for part, value in (("tokenizer", tokenizer), ("text_encoder", encoder)):
            value.save_pretrained(folder / part)
        if token == "<cat>":
            assert len(load_teacher(folder).parts["tokenizer"]) == len(tokenizer)
    with pytest.raises(UserError, match=r"a token of several vectors \(<cat>, textual inversion\)"):
        load_teacher(folder)


@pytest.mark.parametrize("change", [
    index(_class_name="StableDiffusionImg2ImgPipeline"),
    index(_class_name="StableDiffusionInpaintPipeline", image_encoder=["transformers", "CLIPVisionModel"]),
    index(controlnet=[None, None], text_encoder_2=[None, None]),
    unet(class_embed_type=None, time_cond_proj_dim=None, center_input_sample=True),
    vae(shift_factor=0.0, force_upcast=False)], ids=["img2img", "inpaint", "none", "nulls", "no-shift"])
def test_accepted(folder, change):
    change(folder)
    assert load_teacher(folder).parts["text_encoder"].config._attn_implementation == "sdpa"
    load_meta_teacher(str(folder))


@pytest.mark.parametrize("settings, words", [
    (["model.resolution=17"], "model.resolution (17) must be a multiple of 2"),
    (["model.resolution=[16, 20]", "train.samples=1"], "train.samples: the teacher's images of 16 x 20 pixels"),
    (["model.resolution=[16, 17]"], "([16, 17]) must be a multiple of 2"),
    (["noise.t_init=1000"], "below the teacher's 1000 timesteps"), (["noise.t_max=1000"], "noise.t_max (1000)"),
    (["model.revision=main"], "only a model on the hub has revisions"),
    (["synthetic.teacher_share=0.5", "synthetic.teacher_steps=1000"], "1000 steps begin at timestep 1000"),
], ids=["resolution", "drawn", "width", "t_init", "t_max", "revision", "steps"])
def test_plan_refuses_what_training_refuses(capsys, write_config, tmp_path, settings, words):
    options = [word for setting in settings for word in ("--set", setting)]
    for command in ((train.main, "--out", tmp_path / "run"), (cli.main, "plan")):
        assert words in fails(capsys, *command, "--config", write_config(), *options)
    assert not (tmp_path / "run").exists()


def test_an_adapter_that_was_not_merged(folder):
    [path] = (folder / "unet").glob("*.safetensors")
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("to_q.weight"))
    tensors[name.replace("to_q", "to_q.base_layer")] = tensors.pop(name)
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"adapter that was not merged.*fuse_lora\(\)"):
        load_teacher(folder)


def test_sizes_of_an_old_unet(folder):
    """Diffusers takes 64 for it, and it was trained so."""
    unet(_diffusers_version="0.6.0")(folder)
    assert load_teacher(folder).image_size() == load_meta_teacher(str(folder)).image_size() == (128, 128)
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    assert pipe.unet.config.sample_size == 64
