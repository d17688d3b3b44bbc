"""A one-step pipeline as one .safetensors file in Stable Diffusion's original layout, which ComfyUI and A1111 read.

    model.diffusion_model.*                   the UNet
    first_stage_model.*                       the VAE
    cond_stage_model.transformer.text_model.* the text encoder of Stable Diffusion 1.x, CLIP's
    cond_stage_model.model.*                  that of 2.x, in OpenCLIP's names

diffusers converts from this layout only. The file holds weights alone: programs assume all other settings, so a model
for which they would assume wrong ones is refused.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from safetensors.torch import save_file

from sidfast.common.errors import UserError
from sidfast.common.files import replacing_by_name
from sidfast.teachers.weights import check_exportable

_UNET = {"in_channels": 4, "out_channels": 4, "layers_per_block": 2, "act_fn": "silu", "norm_num_groups": 32,
         "norm_eps": 1e-5, "center_input_sample": False, "flip_sin_to_cos": True, "freq_shift": 0,
         "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
         "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3, "mid_block_type": "UNetMidBlock2DCrossAttn",
         "transformer_layers_per_block": 1, "resnet_time_scale_shift": "default", "dual_cross_attention": False}
_VAE = {"latent_channels": 4, "layers_per_block": 2, "act_fn": "silu", "norm_num_groups": 32,
        "scaling_factor": 0.18215, "shift_factor": None, "mid_block_add_attention": True, "use_quant_conv": True,
        "use_post_quant_conv": True, "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4}
_TEXT = {"vocab_size": 49408, "max_position_embeddings": 77, "layer_norm_eps": 1e-5}
_SCHEDULER = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
              "trained_betas": None}
# The two architectures: Stable Diffusion 1.x has CLIP's text encoder, 2.x OpenCLIP's without its last layer.
_V1 = {"unet": _UNET | {"use_linear_projection": False}, "vae": _VAE, "scheduler": _SCHEDULER,
       "text_encoder": _TEXT | {"num_hidden_layers": 12, "hidden_act": "quick_gelu"}}
_V2 = _V1 | {"unet": _UNET | {"use_linear_projection": True},
             "text_encoder": _TEXT | {"num_hidden_layers": 23, "hidden_act": "gelu"}}
_HEAD = 64                                               # channels of a head: of text encoders, and of the UNet of 2.x
_HEADS = 8                                               # of the UNet of 1.x
_TEXTS = {"a photo of a cat": [49406, 320, 1125, 539, 320, 2368, 49407]}        # by CLIP's own tokenizer
_PADDING = {False: 49407, True: 0}                       # of 1.x and 2.x

_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
           "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
_UNET_ENDS = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
              "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
_VAE_INNER = {"conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "group_norm": "norm", "to_q": "q",
              "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {"embeddings.token_embedding.": "token_embedding.", "final_layer_norm.": "ln_final.",
              "embeddings.position_embedding.weight": "positional_embedding",
              "encoder.layers.": "transformer.resblocks.", ".layer_norm1.": ".ln_1.", ".layer_norm2.": ".ln_2.",
              ".self_attn.": ".attn.", ".mlp.fc1.": ".mlp.c_fc.", ".mlp.fc2.": ".mlp.c_proj."}


def write_single_file(pipe: Any, path: str | Path, dtype: torch.dtype = torch.float16,
                      about: dict[str, Any] | None = None) -> None:
    """Write a one-step pipeline to `path`, replacing a file there once the new one is complete.

    `about`: JSON values for the file's metadata. Raises UserError for a pipeline that this layout has no place for.
    """
    check_convertible(pipe)
    tensors = {name: value.to("cpu", dtype).contiguous() for name, value in original_layout(pipe).items()}
    check_exportable(tensors, f"file, as {dtype}".replace("torch.", ""))
    second = pipe.unet.config.use_linear_projection
    metadata = {"format": "pt", "modelspec.sai_model_spec": "1.0.0", "modelspec.title": path.stem,
                "modelspec.architecture": f"stable-diffusion-v{2 if second else 1}",
                "modelspec.prediction_type": {"epsilon": "epsilon", "v_prediction": "v"}[
                    pipe.scheduler.config.prediction_type], "sidfast": json.dumps(about or {})}
    with replacing_by_name(path) as new:
        save_file(tensors, new, metadata)


def original_layout(pipe: Any) -> dict[str, torch.Tensor]:
    """{name: tensor} of a pipeline's UNet, VAE and text encoder in the original layout (`check_convertible`)."""
    tensors = {f"model.diffusion_model.{_unet_name(name, pipe.unet)}": value
               for name, value in pipe.unet.state_dict().items()}
    last = len(pipe.vae.config.block_out_channels) - 1
    for name, value in pipe.vae.state_dict().items():
        of_attention = ".mid_block.attentions." in name and value.ndim == 2      # (a 1 x 1 convolution there)
        tensors[f"first_stage_model.{_vae_name(name, last)}"] = value[..., None, None] if of_attention else value
    text = {name.removeprefix("text_model."): value for name, value in pipe.text_encoder.state_dict().items()}
    if pipe.unet.config.use_linear_projection:
        return tensors | {f"cond_stage_model.model.{name}": value for name, value in _open_clip(text).items()}
    return tensors | {f"cond_stage_model.transformer.text_model.{name}": value for name, value in text.items()}


def check_convertible(pipe: Any) -> None:
    """Raise UserError for a pipeline that differs from Stable Diffusion 1.x and 2.x in what the file does not say."""
    if getattr(pipe, "text_encoder_2", None) is not None:
        _refuse("the pipeline has a second text encoder (Stable Diffusion XL)", "one")
    second = bool(pipe.unet.config.use_linear_projection)
    for part, fixed in (_V2 if second else _V1).items():
        config = getattr(pipe, part).config
        for key, want in fixed.items():
            found = getattr(config, key, want)
            found = list(found) if isinstance(found, tuple) else found
            if found != want and not (want is None and not found):
                _refuse(f"{key} of the {part} is {found!r}", repr(want))
    for module in pipe.unet.modules():
        want = module.inner_dim // _HEAD if second and isinstance(module, Attention) else _HEADS
        if isinstance(module, Attention) and module.heads != want:
            _refuse(f"an attention of the unet has {module.heads} heads", f"{want}")
    text = pipe.text_encoder.config
    if text.hidden_size != _HEAD * text.num_attention_heads:
        _refuse(f"the text_encoder has {text.num_attention_heads} heads", f"{text.hidden_size / _HEAD:g}")
    for words, want in _TEXTS.items():
        found = pipe.tokenizer(words).input_ids
        if found != want:
            _refuse(f"the tokenizer makes {found[:8]} of {words!r}", f"CLIP's own, which makes {want}")
    if pipe.tokenizer.pad_token_id != _PADDING[second] or pipe.tokenizer.model_max_length != 77:
        _refuse(f"the tokenizer pads to {pipe.tokenizer.model_max_length} tokens with token "
                f"{pipe.tokenizer.pad_token_id}", f"77 and {_PADDING[second]}")


def _refuse(found, want):
    raise UserError(f"--single-file: {found}, and programs that read such a file assume {want}; export a folder "
                    "instead (without --single-file)")


def _unet_name(name, unet):
    layers, stem = unet.config.layers_per_block, name.rpartition(".")[0]
    if stem in _UNET_ENDS:
        return name.replace(stem, _UNET_ENDS[stem])
    kind, block, rest = re.fullmatch(r"(down|mid|up)_blocks?\.?(\d*)\.(.*)", name).groups()
    part, number, inner = re.fullmatch(r"(\w+)\.(\d+)\.(.*)", rest).groups()
    number = int(number)
    if part == "resnets":
        inner = _replaced(inner, _RESNET)
    if kind == "mid":
        return f"middle_block.{2 * number + (part == 'attentions')}.{inner}"
    first = int(block) * (layers + 1) + (kind == "down")
    if part == "downsamplers":
        return f"input_blocks.{first + layers}.0.{inner.replace('conv', 'op')}"
    if part == "upsamplers":
        attends = hasattr(unet.up_blocks[int(block)], "attentions")
        return f"output_blocks.{first + layers}.{1 + attends}.{inner}"
    return f"{'input' if kind == 'down' else 'output'}_blocks.{first + number}.{int(part == 'attentions')}.{inner}"


def _vae_name(name, last):
    """`last`: the number of the decoder's last block, which the original layout calls the first."""
    name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{last - int(m[1])}", name).replace("down_blocks.", "down.")
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1").replace(".resnets.", ".block.")
    name = re.sub(r"(up|down)samplers\.0", r"\1sample", name)
    return _replaced(name, _VAE_INNER)


def _open_clip(text):
    found, waiting = {}, {}
    for name, value in text.items():
        for old, new in _OPEN_CLIP.items():
            name = name.replace(old, new, 1)
        projection = re.fullmatch(r"(.*\.attn)\.([qkv])_proj\.(weight|bias)", name)
        if projection:                                   # (q, k and v are one tensor)
            waiting.setdefault(f"{projection[1]}.in_proj_{projection[3]}", {})[projection[2]] = value
        else:
            found[name] = value
    return found | {name: torch.cat([parts[k] for k in "qkv"]) for name, parts in waiting.items()}


def _replaced(name, names):
    """A dotted name with the parts that `names` knows replaced."""
    for old, new in names.items():
        name = re.sub(rf"(^|\.){re.escape(old)}(?=\.)", rf"\g<1>{new}", name)
    return name
