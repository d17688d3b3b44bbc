"""`write_single_file`: diffusers' own converter reads back every weight, and one step of its Euler sampler from the
file's sigma makes the image of the export."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sidfast.common.errors import UserError
from sidfast.publishing.export import write_export
from sidfast.teachers.sd import StableDiffusion
from sidfast.teachers.sd_pipeline import OneStepPipeline
from sidfast.teachers.sd_single_file import check_convertible, original_layout, write_single_file

IDS = {"a": 320, "photo": 1125, "of": 539, "cat": 2368}
V1 = {"unet": {"attention_head_dim": 8, "use_linear_projection": False, "block_out_channels": (32, 32, 64, 64)},
      "text": {"num_hidden_layers": 12, "hidden_act": "quick_gelu"}, "pad": "<|endoftext|>", "kind": "epsilon"}
V2 = {"unet": {"attention_head_dim": (1, 2, 1, 1), "use_linear_projection": True,
               "block_out_channels": (64, 128, 64, 64)},
      "text": {"num_hidden_layers": 23, "hidden_act": "gelu"}, "pad": "!", "kind": "v_prediction"}


def clip_like_tokenizer(pad):
    """As long as CLIP's vocabulary, with CLIP's ids for some words."""
    known, merges = {0: "!", 49406: "<|startoftext|>", 49407: "<|endoftext|>"}, []
    pieces = dict.fromkeys("abcdefghijklmnopqrstuvwxyz")
    for word, number in IDS.items():
        left = [*word[:-1], word[-1] + "</w>"]
        while len(left) > 1:
            merges.append((left[-2], left[-1]))
            left = [*left[:-2], left[-2] + left[-1]]
            pieces[left[-1]] = None
        pieces[word[-1] + "</w>"] = None
        known[number] = left[0]
    rest = iter([piece for piece in pieces if piece not in known.values()])
    vocabulary = {known.get(n) or next(rest, f"unused{n}"): n for n in range(49408)}
    return CLIPTokenizer(vocabulary, merges, pad_token=pad, model_max_length=77)


def pipeline(architecture, t_init=500, tokenizer=None):
    torch.manual_seed(1)
    unet = UNet2DConditionModel(sample_size=8, cross_attention_dim=64, **architecture["unet"])
    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                        block_out_channels=(32,) * 4, layers_per_block=2, sample_size=64)
    text = CLIPTextModel(CLIPTextConfig(hidden_size=64, intermediate_size=16, num_attention_heads=1,
                                        **architecture["text"]))
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1, prediction_type=architecture["kind"])
    return OneStepPipeline(vae=vae, text_encoder=text, unet=unet, scheduler=scheduler, t_init=t_init,
                           tokenizer=tokenizer or clip_like_tokenizer(architecture["pad"]))


@pytest.mark.parametrize("architecture", [V1, V2], ids=["sd1", "sd2"])
def test_diffusers_reads_it_back(architecture, tmp_path):
    pipe, file = pipeline(architecture), tmp_path / "student.safetensors"
    write_single_file(pipe, file, torch.float32, {"step": 7})
    write_export(pipe, tmp_path / "export", torch.float32)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["export", "student.safetensors"]
    got = StableDiffusionPipeline.from_single_file(
        str(file), config=str(tmp_path / "export"), local_files_only=True, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False)
    for part in ("unet", "vae", "text_encoder"):
        want, have = getattr(pipe, part).state_dict(), getattr(got, part).state_dict()
        assert want.keys() == have.keys()
        for name, value in want.items():
            assert torch.equal(have[name], value), f"{part} {name}"
    with safe_open(file, "pt") as f:
        about, names = f.metadata(), set(f.keys())
    assert json.loads(about["sidfast"]) == {"step": 7}
    assert about["modelspec.prediction_type"] == ("v" if architecture is V2 else "epsilon")
    stem = {"epsilon": "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc2.bias",
            "v_prediction": "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight"}
    assert stem[architecture["kind"]] in names

    # one Euler step from sigma to 0, as these programs sample
    a2 = pipe.scheduler.alphas_cumprod[500].item()
    sigma, noise = ((1 - a2) / a2) ** 0.5, torch.randn(1, 4, 8, 8)
    euler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, final_sigmas_type="zero")
    euler.set_timesteps(sigmas=[sigma, 0.0])
    text = got.encode_prompt("a photo of a cat", "cpu", 1, False)[0]
    with torch.no_grad():
        x = euler.scale_model_input(sigma * noise, euler.timesteps[0])
        output = got.unet(x, 500, text, return_dict=False)[0]
        x = euler.step(output, euler.timesteps[0], sigma * noise).prev_sample
    want = pipe("a photo of a cat", latents=noise, output_type="latent").images
    assert torch.allclose(x, want, rtol=1e-4, atol=1e-4)


KNOWN = [                                                # of the published checkpoints; diffusers takes other names too
    "model.diffusion_model.output_blocks.2.1.conv.weight", "model.diffusion_model.output_blocks.5.2.conv.weight",
    "model.diffusion_model.output_blocks.8.2.conv.bias", "model.diffusion_model.input_blocks.9.0.op.weight",
    "model.diffusion_model.input_blocks.11.0.out_layers.3.weight",
    "model.diffusion_model.middle_block.2.in_layers.0.bias",
    "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_out.0.bias",
    "model.diffusion_model.time_embed.2.weight", "model.diffusion_model.out.2.bias",
    "first_stage_model.encoder.down.2.downsample.conv.weight", "first_stage_model.decoder.up.1.upsample.conv.bias",
    "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight",
    "first_stage_model.decoder.mid.attn_1.proj_out.weight",
    "first_stage_model.encoder.mid.block_2.conv2.weight", "first_stage_model.post_quant_conv.weight"]
TEXT = {"sd15": "cond_stage_model.transformer.text_model.encoder.layers.11.self_attn.out_proj.bias",
        "sd21": "cond_stage_model.model.transformer.resblocks.22.mlp.c_proj.weight"}


@pytest.mark.parametrize("name, count", [("sd15", 196), ("sd21", 280)])
def test_names_of_the_real_architectures(name, count):
    with torch.device("meta"):
        pipe = SimpleNamespace(**StableDiffusion().build(name))
    names = original_layout(pipe).keys()
    assert {*KNOWN, TEXT[name]} <= names
    parts = Counter(key.split(".")[0] for key in names)
    assert parts == {"model": 686, "first_stage_model": 248, "cond_stage_model": count}


def changed(part, **values):
    def change(pipe):
        if part == "text_encoder":
            for key, value in values.items():
                setattr(pipe.text_encoder.config, key, value)
        else:
            getattr(pipe, part).register_to_config(**values)
    return change


@pytest.mark.parametrize("change, words", [
    (changed("vae", scaling_factor=0.5), "scaling_factor of the vae is 0.5"),
    (changed("vae", shift_factor=0.1), "shift_factor of the vae is 0.1"),
    (changed("unet", norm_num_groups=16), "norm_num_groups of the unet is 16"),
    (changed("unet", layers_per_block=[2, 2, 2, 1]), "layers_per_block of the unet"),
    (changed("text_encoder", hidden_act="gelu"), "hidden_act of the text_encoder is 'gelu'"),
    (changed("text_encoder", num_attention_heads=2), "the text_encoder has 2 heads"),
    (changed("scheduler", beta_end=0.02), "beta_end of the scheduler is 0.02"),
    (lambda pipe: setattr(pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1, "heads", 4), "4 heads"),
    (lambda pipe: setattr(pipe.tokenizer, "pad_token", "!"), "pads to 77 tokens with token 0"),
], ids=["scaling", "shift", "groups", "layers", "activation", "text-heads", "levels", "heads", "padding"])
def test_what_the_layout_does_not_say_is_refused(sd1, change, words):
    import copy

    pipe = copy.copy(sd1)
    for part in ("unet", "vae", "text_encoder", "scheduler", "tokenizer"):
        setattr(pipe, part, copy.deepcopy(getattr(sd1, part)))
    check_convertible(pipe)
    change(pipe)
    with pytest.raises(UserError, match="--single-file") as raised:
        check_convertible(pipe)
    assert words in str(raised.value) and "\n" not in str(raised.value)


@pytest.fixture(scope="module")
def sd1():
    return pipeline(V1)


def test_another_tokenizer(sd1):
    from sidfast.teachers.tokenizer import build_tokenizer

    with pytest.raises(UserError, match="the tokenizer makes"):
        check_convertible(pipeline(V1, tokenizer=build_tokenizer()))


def test_command(monkeypatch, capsys, tmp_path, sd1, tiny_config):
    """`sidfast export --single-file`: one file, and the sigma to start from; what it refuses leaves nothing behind."""
    from helpers_checkpoint import write_checkpoint
    from helpers_input import fails

    from sidfast import cli
    from sidfast.config.schema import build_config
    from sidfast.teachers.load import load_teacher

    write_export(sd1, tmp_path / "teacher", torch.float32)
    index = tmp_path / "teacher" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "StableDiffusionPipeline"}))
    run, out = tmp_path / "run", tmp_path / "student.safetensors"
    run.mkdir()
    config = build_config(tiny_config | {"model": {"teacher": str(tmp_path / "teacher")}}, "test")
    (run / "config.json").write_text(json.dumps({"config": config.model_dump()}))
    weights = load_teacher(str(tmp_path / "teacher")).network.state_dict()
    write_checkpoint(run / "checkpoints", 7, {name: value + 0.5 for name, value in weights.items()})
    arguments = ["export", "--run", str(run), "--single-file", "--dtype", "fp32"]
    assert cli.main([*arguments, "--out", str(out)]) == 0
    assert "after 7 updates; sample it in one step from sigma 2.5017, with cfg 1" in capsys.readouterr().out
    with safe_open(out, "pt") as f:
        assert torch.equal(f.get_tensor("model.diffusion_model.out.2.bias"), weights["conv_out.bias"] + 0.5)
        assert json.loads(f.metadata()["sidfast"])["step"] == 7
    assert out.stat().st_mode & 0o777 == (run / "config.json").stat().st_mode & 0o777
    before = sorted(tmp_path.iterdir())
    assert "must end in .safetensors" in fails(capsys, cli.main, *arguments, "--out", tmp_path / "x")
    config = build_config(tiny_config, "test")
    (run / "config.json").write_text(json.dumps({"config": config.model_dump()}))
    line = fails(capsys, cli.main, *arguments, "--out", tmp_path / "x.safetensors")
    assert "is not of this run's teacher" in line and sorted(tmp_path.iterdir()) == before
