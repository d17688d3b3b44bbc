"""What is measured on each image by itself."""

import torch

from sidfast.common.errors import NonFiniteImage, UserError
from sidfast.data import shapes
from sidfast.evaluation.attributes import correct


class FeatureExtractors:
    """Looks at images [N, 3, H, W] in [0, 1] through whichever networks the metrics need.

    `features`: a feature network (FID, KID, precision, recall); `clip`: ClipFeatures (CLIP score, diversity);
    `checker`: the AttributeChecker of the shapes world (accuracy). None leaves a measure out; `embeddings` keeps the
    CLIP's image embeddings, which diversity needs.
    """

    def __init__(self, features=None, clip=None, checker=None, embeddings=False, device="cpu"):
        self.features, self.clip, self.checker = features, clip, checker
        self.embeddings, self.device = embeddings, device

    def to(self, device):
        """Move the networks. Returns itself."""
        for network in {id(n): n for n in (self.features, self.clip, self.checker) if n}.values():
            network.to(device)
        self.device = device
        return self

    @torch.no_grad()
    def rows(self, images, prompts, first=0):
        """{name: [N, ...]} of N images made from N prompts; `first` is the number of the first one, for messages.

        "features" [N, D], "clip_cosine" [N], "clip_embedding" [N, E], "right_<attribute>" [N] bool. Raises UserError
        for an image that has non-finite pixels, and for features that are not finite.
        """
        images = self._take(images, first)
        embedding = self.clip.embed(images) if self.clip else None
        rows = {}
        if self.features:
            shared = self.features is self.clip
            rows["features"] = self.features.scale(embedding) if shared else self.features(images)
        if self.clip:
            rows["clip_cosine"] = (embedding * self.clip.embed_text(prompts)).sum(1)
        if self.embeddings:
            rows["clip_embedding"] = embedding
        _check_features(rows)
        if self.checker:
            hits = correct(self.checker(images * 2 - 1), shapes.parse_captions(prompts).to(self.device))
            rows |= {f"right_{name}": hit for name, hit in hits.items()}
        return rows

    @torch.no_grad()
    def reference_rows(self, images, _, first=0):
        """{"features": [N, D]} of images of the reference."""
        rows = {"features": self.features(self._take(images, first))}
        _check_features(rows)
        return rows

    def _take(self, images, first):
        images = images.to(self.device, torch.float32)
        finite = images.isfinite().all(dim=(1, 2, 3)) if images.ndim == 4 else images.isfinite()
        if not finite.all():
            raise NonFiniteImage(f"image {first + int((~finite).nonzero()[0])} has non-finite pixels; the model is "
                                 "broken, or its type too narrow (--dtype fp32)")
        return images.clamp(0, 1)


def _check_features(rows):
    for values in rows.values():
        if not values.isfinite().all():
            raise UserError("the CLIP or feature network gives features that are not finite; its weights are broken")
