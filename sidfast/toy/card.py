"""The embedded teacher's model card."""

import torch


def model_card(recipe, numbers, device):
    """Markdown: what the teacher is, how it was made, and how good it is."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    rows = [_row("real drawings", numbers["real"])]
    rows += [_row(name, value) for name, value in numbers.items() if name.startswith("guidance")]
    settings = "\n".join(f"| {key} | {value} |" for key, value in vars(recipe).items())
    table = "\n".join(rows)
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# The embedded teacher

A small latent diffusion model of the *shapes world*: 64 x 64 images of one to three coloured shapes, with captions such
as "a small red circle above a large blue square on a white background". It has the layout of a Stable Diffusion
pipeline (VAE to 8 x 8 x {recipe.latent_channels} latents, CLIP text encoder of two layers, UNet with cross-attention, scaled-linear noise schedule,
epsilon prediction) and knows nothing but this world.

## How it was made

    sidfast teacher --out assets

on one {where}, torch {torch.__version__}, in {numbers["training_seconds"]} s. All data are drawn by code; one in eight
combinations of caption and arrangement was never shown in training and serves for evaluation.

| setting | value |
|---|---|
{settings}

## How good it is

{numbers["real"]["images"]} held-out captions, {recipe.sampler} steps of DDIM, seeds 0, 1, 2, .... The accuracy is that of a classifier trained on real drawings only
(share of images that show every attribute of their caption). FID and CLIP score are in the features of the small CLIP
that comes with the teacher; they are no Inception FID and no OpenAI CLIP score.

| images | every attribute | CLIP score | FID (small CLIP) | count | layout | background | size | color | shape |
|---|---|---|---|---|---|---|---|---|---|
{table}

Reconstructions by the VAE keep every attribute in {numbers["reconstruction"]["all"]:.2%} of held-out drawings.
"""


def _row(name, m):
    each = " | ".join(f"{m['accuracy_' + a]:.4f}" for a in ("count", "layout", "background", "size", "color", "shape"))
    return f"| {name} | {m['accuracy']:.4f} | {m['clip_score']:.4f} | {m['fid_small_clip']:.3f} | {each} |"
