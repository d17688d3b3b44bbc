"""The fused decoder, and whole pipelines on fused kernels, against diffusers' own."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import AutoencoderKL
from helpers_kernels import DEVICES
from helpers_latents import error

from sidfast import cli
from sidfast.accel import pipeline as fused_pipeline
from sidfast.accel.decoder import decoder_fuse_blocker, fuse_decoder
from sidfast.accel.pipeline import Replayed, fuse_pipeline
from sidfast.accel.prepacked import refresh
from sidfast.common.errors import UserError
from sidfast.publishing.load import load_pipeline


def vae_of(**options):
    """A small VAE with nothing at its initial zeros and ones."""
    torch.manual_seed(0)
    options = {"block_out_channels": (8, 12), "norm_num_groups": 4, "latent_channels": 4, "layers_per_block": 1,
               "up_block_types": ("UpDecoderBlock2D",) * 2, "down_block_types": ("DownEncoderBlock2D",) * 2} | options
    vae = AutoencoderKL(**options)
    with torch.no_grad():
        for p in vae.parameters():
            if p.ndim == 1:
                p.add_(0.2 * torch.randn_like(p))
    return vae


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{}, {"mid_block_add_attention": False}], ids=["attention", "none"])
@torch.no_grad()
def test_fused_decoder(options, device, monkeypatch):
    """In fp32: the pixels of diffusers' decoder in float64; kept weights give the same bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    vae = vae_of(**options)
    z = torch.randn(2, 4, 5, 3)
    want = copy.deepcopy(vae).double().decode(z.double(), return_dict=False)[0]
    names = list(vae.state_dict())
    fuse_decoder(vae.to(device))
    got = vae.decode(z.to(device), return_dict=False)[0]
    assert error(got, want) < 1e-5 and list(vae.state_dict()) == names
    refresh(vae)
    assert torch.equal(vae.decode(z.to(device), return_dict=False)[0], got)


@pytest.mark.gpu
@torch.no_grad()
def test_fused_decoder_in_bf16():
    """At Stable Diffusion's size: no further from fp32 than diffusers' own bf16."""
    with torch.device("cuda"):
        vae = vae_of(block_out_channels=(128, 256, 512, 512), norm_num_groups=32, layers_per_block=2,
                     up_block_types=("UpDecoderBlock2D",) * 4, down_block_types=("DownEncoderBlock2D",) * 4)
        z = torch.randn(2, 4, 64, 64)
    vae.bfloat16().float()
    want = vae.decode(z, return_dict=False)[0]
    plain = vae.bfloat16().decode(z.bfloat16(), return_dict=False)[0]
    got = fuse_decoder(vae).decode(z.bfloat16(), return_dict=False)[0]
    assert error(got.float(), want) <= 1.1 * error(plain.float(), want)


def test_what_is_not_covered():
    assert decoder_fuse_blocker(vae_of()) is None
    assert "relu" not in decoder_fuse_blocker(vae_of(act_fn="mish")) and decoder_fuse_blocker(torch.nn.Linear(1, 1))
    vae = vae_of()
    vae.decoder.mid_block.attentions[0].rescale_output_factor = 2
    with pytest.raises(ValueError, match="cannot run on the fused kernels: attention of another kind"):
        fuse_decoder(vae)


@pytest.mark.parametrize("device", DEVICES)
def test_a_pipeline(tiny_teacher, monkeypatch, device):
    """The images of the tiny teacher in two steps, one decoded at a time: the same but for rounding."""
    monkeypatch.setattr(fused_pipeline, "_PIXELS", 1)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    images = []
    for fused in (False, True):
        pipe, _ = load_pipeline(str(tiny_teacher), torch.device(device))
        if fused:
            fuse_pipeline(pipe, 4, "model")              # both branches of guidance
        pipe.set_progress_bar_config(disable=True)
        images.append(pipe(["a", "b"], num_inference_steps=2, output_type="np",
                           generator=torch.Generator().manual_seed(0)).images)
    assert np.abs(images[0] - images[1]).max() < 1e-4 and images[0].std() > 0


@torch.no_grad()
def test_replayed_is_the_function():
    """For its own number of rows, with new inputs and other shapes; results are not overwritten by later calls."""
    calls = []

    def function(x, y):
        calls.append(len(x))
        return 2 * x + y

    replayed = Replayed(function, 3)
    inputs = [(torch.randn(n, 2), torch.randn(n, 1)) for n in (2, 3, 3, 1)] + [(torch.randn(3, 4), torch.randn(3, 1))]
    results = [replayed(*pair) for pair in inputs]
    assert all(torch.equal(result, 2 * x + y) for result, (x, y) in zip(results, inputs, strict=True))
    assert calls == [2, 3, 3, 1, 3]


def test_pipelines_that_are_not_covered(tiny_teacher):
    pipe, _ = load_pipeline(str(tiny_teacher), torch.device("cpu"))
    pipe.unet.register_to_config(addition_embed_type="text_time")
    with pytest.raises(UserError, match=r"model: .* a UNet with further conditions \(SDXL\)"):
        fuse_pipeline(pipe, 2, "model")
    with pytest.raises(UserError, match=r"model: .* a pipeline without unet"):
        fuse_pipeline(SimpleNamespace(vae=pipe.vae, tokenizer=pipe.tokenizer), 2, "model")


def test_without_a_gpu(tiny_teacher, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(fused_pipeline, "INTERPRETED", False)
    pipe, _ = load_pipeline(str(tiny_teacher), torch.device("cpu"))
    with pytest.raises(UserError, match="model: cannot run on the fused kernels: there is no GPU here"):
        fuse_pipeline(pipe, 2, "model")
    (tmp_path / "prompts.txt").write_text("a\n" * 400)
    np.savez(tmp_path / "reference.npz", mu=np.zeros(128), sigma=np.eye(128))
    out = tmp_path / "result.json"
    assert cli.main(["evaluate", "--model", str(tiny_teacher), "--prompts", str(tmp_path / "prompts.txt"), "--metrics",
                     "fid", "--features", f"clip:{ROOT / 'assets' / 'clip'}", "--reference",
                     str(tmp_path / "reference.npz"), "--out", str(out), "--fused"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0 and "--fused" in said and "there is no GPU here" in said and not out.exists()
