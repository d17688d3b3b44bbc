"""`sidfast teacher`: train the embedded teacher, judge it, and write it as diffusers and transformers folders."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPImageProcessor

from sidfast.common.errors import UserError
from sidfast.common.files import check_folder, replacing_folder
from sidfast.data import shapes
from sidfast.evaluation.attributes import correct, load_checker, save_checker
from sidfast.evaluation.evaluate import evaluate, pipeline_generator
from sidfast.evaluation.features import ClipFeatures
from sidfast.evaluation.judge import FeatureExtractors
from sidfast.publishing.export import save_module
from sidfast.teachers.sd import stable_diffusion_scheduler
from sidfast.teachers.tokenizer import build_tokenizer
from sidfast.toy import train
from sidfast.toy.card import model_card

GATE = 0.97                                              # reconstructions that must keep every attribute
GUIDANCE = (1.0, 1.5, 2.0, 3.0)


def build_teacher(out, recipe, device):
    """Train everything and write `out`/teacher, `out`/clip and `out`/checker. Returns the numbers of the model card.

    Folders of an earlier teacher are replaced only once the new ones are complete. Raises RuntimeError if the VAE loses
    more attributes than GATE allows in a run of full length: no teacher can be better than its VAE; UserError, before
    anything is trained, if `out` cannot take the folders, or holds others of their names.
    """
    check_out(out)
    out, started = Path(out), time.time()
    torch.manual_seed(recipe.seed)
    tokenizer = build_tokenizer()
    with ThreadPoolExecutor(1) as pool:                  # half a million captions, while the GPU trains the VAE
        captions = pool.submit(train.sample_captions, recipe, tokenizer)
        checker = train.train_checker(recipe, device)
        vae = train.train_vae(recipe, device)
        scenes, ids = captions.result()
    kept = reconstruction_accuracy(vae, checker, recipe.judged, device)
    print(f"VAE reconstructions that keep every attribute: {kept['all']:.4f}", flush=True)
    if kept["all"] < GATE and recipe.vae_steps >= train.Recipe.vae_steps:
        raise RuntimeError(f"the VAE keeps every attribute in {kept['all']:.1%} of images, {GATE:.0%} are needed")
    scenes, ids = scenes.to(device), ids.to(device)
    clip = train.train_clip(recipe, tokenizer, scenes, ids, device)
    unet, text_encoder = train.train_unet(recipe, tokenizer, vae, clip, scenes, ids, device)
    seconds = round(time.time() - started)

    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet,
        scheduler=stable_diffusion_scheduler("epsilon"), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False)
    _round_to_fp16(vae, unet, text_encoder, clip, checker)
    numbers = {"training_seconds": seconds, "reconstruction": kept}
    numbers |= _judge(pipe, clip, checker, tokenizer, recipe, device)
    _write(out, pipe, clip, checker, tokenizer, numbers, model_card(recipe, numbers, device))
    return numbers


def check_out(out):
    """Raise UserError unless `out` can take a teacher, its CLIP and its checker; what is there of them must be an
    earlier build's."""
    check_folder(out)
    for name, written in _WRITTEN.items():
        folder = Path(out) / name
        if os.path.lexists(folder) and not (folder.is_dir() and (not any(folder.iterdir()) or written(folder))):
            raise UserError(f"--out {out}: {folder} would be replaced, and `sidfast teacher` did not write it; choose "
                            "another --out, or move it")


def _is_teacher(folder):
    return all((folder / name).is_file() for name in ("model_index.json", "numbers.json"))


def _is_clip(folder):                                    # (no other CLIP sees images so small)
    try:
        size = json.loads((folder / "preprocessor_config.json").read_text())["size"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return size == _SIDE and (folder / "config.json").is_file()


def _is_checker(folder):
    try:
        load_checker(folder)
    except UserError:
        return False
    return True


_SIDE = {"height": shapes.IMAGE_SIZE, "width": shapes.IMAGE_SIZE}
_WRITTEN = {"teacher": _is_teacher, "clip": _is_clip, "checker": _is_checker}


def _judge(pipe, clip, checker, tokenizer, recipe, device):
    """The measures of real drawings (the best that any generator can reach) and of the teacher at each guidance."""
    captions = shapes.captions(shapes.sample_scenes(recipe.judged, "held_out", torch.Generator().manual_seed(1)))
    drawing = torch.Generator(device).manual_seed(7)

    def draw(texts, seeds):
        return (shapes.draw(shapes.parse_captions(texts).to(device), drawing) + 1) / 2

    generators = {"real": draw}
    for g in GUIDANCE:
        generators[f"guidance {g}"] = pipeline_generator(pipe, num_inference_steps=recipe.sampler,
                                                            guidance_scale=g)
    features = ClipFeatures(clip, tokenizer)
    judge = FeatureExtractors(features, features, checker, device=device)
    return {name: evaluate(generate, captions, judge, 1000, name)
            for name, generate in generators.items()}


@torch.no_grad()
def reconstruction_accuracy(vae, checker, images, device, n=500):
    """Share of held-out drawings whose reconstruction keeps each attribute, and all of them."""
    hits = []
    for start in range(0, images, n):
        scenes = shapes.sample_scenes(min(n, images - start), "held_out", device=device)
        latents = vae.encode(shapes.draw(scenes)).latent_dist.sample()
        hits.append(correct(checker(vae.decode(latents).sample.clamp(-1, 1)), scenes))
    return {k: torch.cat([h[k] for h in hits]).double().mean().item() for k in hits[0]}


@torch.no_grad()
def _round_to_fp16(*modules):
    """Round weights as their fp16 files will hold them, so that what is judged is what is shipped."""
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(tensor.half())


def _write(out, pipe, clip, checker, tokenizer, numbers, card):
    with replacing_folder(out / "teacher") as folder:
        pipe.save_pretrained(folder)
        for name in ("vae", "unet"):                     # again, in fp16; transformers would load it as fp16,
            save_module(getattr(pipe, name), folder / name)                      # so the text encoder stays in fp32
        (folder / "README.md").write_text(card, encoding="utf-8")
        (folder / "numbers.json").write_text(json.dumps(numbers, indent=2) + "\n")
    with replacing_folder(out / "clip") as folder:
        save_module(clip, folder)
        tokenizer.save_pretrained(folder)
        CLIPImageProcessor(size=_SIDE, crop_size=_SIDE, do_center_crop=False, image_mean=[0.5] * 3,
                           image_std=[0.5] * 3).save_pretrained(folder)
    with replacing_folder(out / "checker") as folder:
        save_checker(checker, folder)
