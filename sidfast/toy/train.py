"""Training of the embedded teacher, stage by stage: checker, VAE, CLIP, then UNet and text encoder together.

Every stage draws its own data, and on a GPU its whole step, drawing included, is one CUDA graph.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from sidfast.accel.graphs import GraphedStep
from sidfast.data import shapes
from sidfast.evaluation.attributes import AttributeChecker, checker_loss
from sidfast.teachers import sd_shapes as networks
from sidfast.teachers.clip import tokenize


@dataclass(frozen=True)
class Recipe:
    """Steps, batch sizes and learning rates of the stages."""

    seed: int = 0
    latent_channels: int = 4
    captions: int = 2**19                                # training captions, each drawn anew every time
    prompt_dropout: float = 0.1                          # share of empty captions, for guidance
    kl_weight: float = 1e-5
    edge_weight: float = 6.0                             # of pixels near an edge in the VAE's loss
    checker_steps: int = 1500
    checker_batch: int = 256
    checker_lr: float = 2e-3
    vae_steps: int = 4000
    vae_batch: int = 128
    vae_lr: float = 1e-3
    clip_steps: int = 1500
    clip_batch: int = 1024
    clip_lr: float = 1e-3
    unet_steps: int = 9000
    unet_batch: int = 512
    unet_lr: float = 1e-3
    latents: int = 4096                                  # drawings behind the latents' mean and variance
    judged: int = 5000                                   # held-out captions behind each number of the card
    sampler: int = 50                                    # steps of DDIM for these

    def scaled(self, unet_steps):
        """The same recipe with all stages as much shorter or longer as the UNet's, and fewer images judged after fewer
        steps. Below a hundredth, which only tries the code, batches and the sampler are smaller too."""
        ratio = unet_steps / self.unet_steps
        sizes = {k: max(1, round(getattr(self, k) * ratio)) for k in vars(self) if k.endswith("_steps")}
        sizes |= {k: max(least, round(getattr(self, k) * min(1, ratio))) for k, least in _LEAST.items()}
        if ratio < 0.01:
            sizes |= {k: max(8, round(getattr(self, k) * 100 * ratio)) for k in vars(self) if k.endswith("_batch")}
            sizes |= {"latents": 16, "judged": 16, "sampler": 2}
        return replace(self, **sizes)


_LEAST = {"captions": 64, "judged": 1000}                # however short a recipe is


def train_checker(recipe, device):
    """The judge of attributes: real drawings, made blurred and noisy at random so that it judges content."""
    checker, n = AttributeChecker().to(device), recipe.checker_batch

    def loss():
        scenes = shapes.sample_scenes(n, "all", device=device)
        image = shapes.draw(scenes)
        blurred = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, 1)
        share, noise = torch.rand(2, n, 1, 1, 1, device=device)
        image = torch.lerp(image, blurred, share**2) + 0.1 * noise * torch.randn_like(image)
        return checker_loss(checker(image), scenes)

    _train("checker", [checker], loss, recipe.checker_steps, recipe.checker_lr, device)
    return checker.eval().requires_grad_(False)


def train_vae(recipe, device):
    """The VAE: L1 + 2 MSE, edges weighted up, and a light KL; its latents are then brought to mean 0, variance 1."""
    vae = networks.build_vae(recipe.latent_channels).to(device)

    def loss():
        image = shapes.draw(shapes.sample_scenes(recipe.vae_batch, "train", device=device))
        posterior = vae.encode(image).latent_dist
        error = vae.decode(posterior.sample()).sample.float() - image
        reconstruction = (_edge_weight(image, recipe.edge_weight) * (error.abs() + 2 * error**2)).mean()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        return reconstruction + recipe.kl_weight * 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()

    _train("vae", [vae], loss, recipe.vae_steps, recipe.vae_lr, device)
    vae.eval().requires_grad_(False)
    _standardise_latents(vae, recipe.latents, device)
    return vae


def _edge_weight(image, weight):
    """[N, 1, H, W]: 1 in flat regions, up to 1 + weight within two pixels of an edge."""
    contrast = F.max_pool2d(image, 5, 1, 2) + F.max_pool2d(-image, 5, 1, 2)
    return 1 + weight * contrast.amax(1, keepdim=True) / 2


@torch.no_grad()
def _standardise_latents(vae, images, device, n=256):
    """Fold a shift and a scale per latent channel into the 1x1 convolutions around the latents, so that over the
    world they have mean 0 and variance 1 channel by channel, and scaling_factor is 1."""
    latents = torch.cat([vae.encode(shapes.draw(shapes.sample_scenes(min(n, images - start), device=device))
                                    ).latent_dist.sample() for start in range(0, images, n)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = len(mean)
    after, before = vae.quant_conv, vae.post_quant_conv          # outputs are (mean, logvar)
    after.weight[:channels] /= std[:, None, None, None]
    after.bias[:channels] = (after.bias[:channels] - mean) / std
    after.bias[channels:] -= 2 * std.log()
    before.bias += before.weight[:, :, 0, 0] @ mean
    before.weight *= std[None, :, None, None]


def sample_captions(recipe, tokenizer):
    """The training captions: Scenes and their token ids [captions, L], on the CPU."""
    generator = torch.Generator().manual_seed(recipe.seed)
    scenes, ids = [], []
    for start in range(0, recipe.captions, 65536):
        scenes.append(shapes.sample_scenes(min(65536, recipe.captions - start), "train", generator))
        ids.append(tokenize(tokenizer, shapes.captions(scenes[-1])))
    return shapes.concatenate(scenes), torch.cat(ids)


def train_clip(recipe, tokenizer, scenes, ids, device):
    """CLIP on drawings of the training captions."""
    clip, n = networks.build_clip(tokenizer).to(device), recipe.clip_batch
    target = torch.arange(n, device=device)

    def loss():
        row = torch.randint(len(scenes), (n,), device=device)
        logits = clip(input_ids=ids[row], pixel_values=shapes.draw(scenes[row])).logits_per_image.float()
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    _train("clip", [clip], loss, recipe.clip_steps, recipe.clip_lr, device)
    return clip.eval().requires_grad_(False)


def train_unet(recipe, tokenizer, vae, clip, scenes, ids, device):
    """UNet and text encoder, on latents of one drawing per training caption (epsilon prediction, method.md eq. 5)."""
    unet = networks.build_unet(recipe.latent_channels).to(device)
    text_encoder = networks.build_text_encoder(clip).to(device).requires_grad_(True)
    a, s = (level.to(device)[:, None, None, None] for level in networks.noise_levels())
    mean, std = _encode_all(vae, scenes, device)
    null, n = tokenize(tokenizer, [""]).to(device), recipe.unet_batch

    def loss():
        row = torch.randint(len(scenes), (n,), device=device)
        dropped = torch.rand(n, 1, device=device) < recipe.prompt_dropout
        text = text_encoder(input_ids=torch.where(dropped, null, ids[row])).last_hidden_state
        latents = mean[row].float() + std[row].float() * torch.randn_like(mean[row], dtype=torch.float32)
        t = torch.randint(len(a), (n,), device=device)
        noise = torch.randn_like(latents)
        prediction = unet(a[t] * latents + s[t] * noise, t, encoder_hidden_states=text).sample.float()
        return F.mse_loss(prediction, noise)

    _train("unet", [unet, text_encoder], loss, recipe.unet_steps, recipe.unet_lr, device)
    return unet.eval().requires_grad_(False), text_encoder.eval().requires_grad_(False)


@torch.no_grad()
def _encode_all(vae, scenes, device, n=2048):
    """Posterior mean and standard deviation of one drawing per scene, in bfloat16."""
    means, stds = [], []
    for start in range(0, len(scenes), n):
        posterior = vae.encode(shapes.draw(scenes[slice(start, start + n)])).latent_dist
        means.append(posterior.mean.bfloat16())
        stds.append(posterior.std.bfloat16())
    return torch.cat(means), torch.cat(stds)


def _train(name, modules, loss, steps, lr, device, clip_norm=1.0):
    """AdamW with 2 % warm-up, then a cosine to zero; bfloat16 autocast on a GPU."""
    parameters = [p for module in modules for p in module.parameters()]
    gpu = device.type == "cuda"
    rate = torch.zeros((), device=device) if gpu else 0.0
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-4, fused=True, capturable=gpu)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=gpu):
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimizer.step()
        return value.detach()

    run = GraphedStep(step, device)                      # its warm-up steps have learning rate 0
    progress = tqdm(range(steps), desc=name, mininterval=2, maxinterval=10)
    for i in progress:
        value = lr * min((i + 1) / (0.02 * steps), 0.5 + 0.5 * math.cos(math.pi * i / steps))
        for group in optimizer.param_groups:
            group["lr"] = group["lr"].fill_(value) if gpu else value
        latest = run()
        if i % 100 == 0:
            progress.set_postfix(loss=f"{latest.item():.4f}", refresh=False)
