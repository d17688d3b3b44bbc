"""`sidfast teacher`: what a shorter recipe leaves out, and a trial of the whole command."""

import json
from dataclasses import asdict

import pytest

from sidfast import cli
from sidfast.toy.train import Recipe


def test_shorter_recipe():
    """All stages scale with the UNet's steps; what the full recipe is stays as it is."""
    full = Recipe()
    assert full.scaled(full.unet_steps) == full
    half, double = full.scaled(4500), full.scaled(18000)
    assert (half.vae_steps, half.clip_steps, half.judged, half.sampler, half.vae_batch) == (2000, 750, 2500, 50, 128)
    assert (double.vae_steps, double.judged, double.captions) == (8000, 5000, full.captions)


def test_trial_recipe_is_small():
    """Two steps take no longer to be judged than to be trained: every size is scaled down."""
    trial = asdict(Recipe().scaled(2))
    assert {trial[f"{stage}_steps"] for stage in ("checker", "vae", "clip")} == {1} and trial["unet_steps"] == 2
    images = trial["judged"] * (1 + trial["sampler"] * 4)
    images += sum(trial[f"{stage}_batch"] * trial[f"{stage}_steps"] for stage in ("checker", "vae", "clip", "unet"))
    assert images + trial["latents"] + trial["captions"] < 1500


@pytest.mark.slow
def test_trial_of_the_command(tmp_path):
    """It leaves a teacher that others of the commands can take."""
    assert cli.main(["teacher", "--steps", "2", "--out", str(tmp_path)]) == 0
    numbers = json.loads((tmp_path / "teacher" / "numbers.json").read_text())
    assert numbers["real"]["images"] == 16 and numbers["guidance 1.5"]["fid_small_clip"] > 0
    assert "16 held-out captions, 2 steps of DDIM" in (tmp_path / "teacher" / "README.md").read_text()
    assert cli.main(["sample", "--model", str(tmp_path / "teacher"), "--prompt", "a small red circle", "--steps", "2",
                     "--out", str(tmp_path / "x.png")]) == 0
