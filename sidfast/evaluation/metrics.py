"""Measures of images of the shapes world: attribute accuracy, and CLIP score and FID in the small CLIP's features.

The FID here lives in the features of the embedded CLIP, which is why every output calls it `fid_small_clip`: it is
no Inception FID, and the two cannot be compared.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from sidfast.data import shapes
from sidfast.errors import UserError
from sidfast.evaluation.attributes import correct, load_checker


class ClipFeatures(nn.Module):
    """Images [N, 3, H, W] in [0, 1] -> features [N, D], for FID: the unit-length image embeddings of a CLIP, times
    sqrt(1000), so that the distance comes out in thousandths of the embedding's own."""

    def __init__(self, clip):
        super().__init__()
        self.clip = clip
        self.num_features = clip.config.projection_dim

    def embed(self, images):
        """Unit-length embeddings [N, D]."""
        return F.normalize(self.clip.get_image_features(pixel_values=images * 2 - 1).pooler_output.float(), dim=-1)

    def forward(self, images):
        return self.embed(images) * 1000**0.5


class ShapesMetrics:
    """Accumulates generated images of held-out captions and compares them with the true world.

    The real images are drawn anew from the same captions with a seed of their own, so the captions agree and the
    positions do not.
    """

    def __init__(self, clip, checker, tokenizer, device):
        from torchmetrics.image.fid import FrechetInceptionDistance

        self.device, self.tokenizer, self.checker = device, tokenizer, checker
        self.features = ClipFeatures(clip)
        self.fid = FrechetInceptionDistance(feature=self.features, normalize=True).to(device)
        self.drawing = torch.Generator(device).manual_seed(20_000_003)
        self.hits, self.cosines = [], []

    @torch.no_grad()
    def update(self, images, captions):
        """Add images [N, 3, 64, 64] in [0, 1] that were made from N captions of the shapes world."""
        images = images.to(self.device, torch.float32).clamp(0, 1)
        scenes = shapes.parse_captions(captions).to(self.device)
        self.hits.append(correct(self.checker(images * 2 - 1), scenes))
        self.cosines.append((self.features.embed(images) * self._embed_text(captions)).sum(1))
        self.fid.update(images, real=False)
        self.fid.update((shapes.draw(scenes, self.drawing) + 1) / 2, real=True)

    def compute(self):
        """{"images", "accuracy", "accuracy_<attribute>"..., "clip_score", "fid_small_clip"} as plain numbers."""
        hits = {k: torch.cat([h[k] for h in self.hits]).double().mean().item() for k in self.hits[0]}
        cosines = torch.cat(self.cosines)
        result = {"images": len(cosines), "accuracy": hits.pop("all")}
        result |= {f"accuracy_{k}": v for k, v in hits.items()}
        return result | {"clip_score": cosines.double().mean().item(), "fid_small_clip": self.fid.compute().item()}

    def _embed_text(self, captions):
        ids = tokenize(self.tokenizer, captions).to(self.device)
        return F.normalize(self.features.clip.get_text_features(input_ids=ids).pooler_output.float(), dim=-1)


def tokenize(tokenizer, texts):
    """Token ids [N, L], padded and cut to the tokenizer's length."""
    return tokenizer(list(texts), padding="max_length", truncation=True, max_length=tokenizer.model_max_length,
                     return_tensors="pt").input_ids


def load_shapes_metrics(assets, device):
    """ShapesMetrics with the CLIP and the checker of an assets folder (as `sidfast teacher` writes it)."""
    from transformers import CLIPModel, CLIPTokenizer

    assets = Path(assets)
    if not (assets / "clip" / "config.json").is_file():
        raise UserError(f"no CLIP in {assets / 'clip'}; `sidfast teacher --out {assets}` trains one")
    clip = CLIPModel.from_pretrained(assets / "clip", dtype=torch.float32).to(device).eval().requires_grad_(False)
    tokenizer = CLIPTokenizer.from_pretrained(assets / "clip")
    return ShapesMetrics(clip, load_checker(assets / "checker", device), tokenizer, device)
