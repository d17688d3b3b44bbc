"""Networks that turn images into features: a CLIP of transformers, or the Inception-v3 that FID is defined by.

Images are [N, 3, H, W] in [0, 1] everywhere. A network has a `suffix` for the names of the metrics in its features,
so that a distance in the features of one network is never mistaken for that of another: `fid` is Inception's alone.
"""

import hashlib
import os
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as image_ops

from sidfast.data import shapes
from sidfast.errors import UserError
from sidfast.networks.untrusted import refuse_pickles

INCEPTION_URL = ("https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
                 "weights-inception-2015-12-05-6726825d.pth")


class ClipFeatures:
    """A CLIP's image and text embeddings.

    Called as a feature network it gives the unit-length image embeddings times sqrt(1000), [N, D], so that a FID comes
    out in thousandths of the embedding's own. `mean` and `std` [3] are those that the CLIP was trained with.
    """

    def __init__(self, clip, tokenizer, mean=(0.5,) * 3, std=(0.5,) * 3, path=None, sha256=None):
        self.clip, self.tokenizer, self.path, self.sha256 = clip, tokenizer, path, sha256
        self.side = clip.config.vision_config.image_size
        self.mean, self.std = (torch.tensor(v).view(1, 3, 1, 1) for v in (mean, std))
        self.to(clip.device)
        self.dimension = clip.config.projection_dim
        self.suffix = "_small_clip" if self.side == shapes.IMAGE_SIZE else "_clip"     # no published CLIP is so small

    def __call__(self, images):
        """Features [N, D] of images [N, 3, H, W] in [0, 1]."""
        return self.scale(self.embed(images))

    def to(self, device):
        """Move the network."""
        self.clip.to(device)
        self.mean, self.std = self.mean.to(device), self.std.to(device)

    @staticmethod
    def scale(embeddings):
        """The features [N, D] that belong to embeddings [N, D]."""
        return embeddings * 1000**0.5

    def embed(self, images):
        """Unit-length embeddings [N, D], fp32, of images [N, 3, H, W] in [0, 1]."""
        if min(images.shape[-2:]) != self.side:
            images = image_ops.resize(images, [self.side], image_ops.InterpolationMode.BICUBIC, antialias=True)
            images = images.clamp(0, 1)
        pixels = (image_ops.center_crop(images, [self.side] * 2) - self.mean) / self.std
        return F.normalize(self.clip.get_image_features(pixel_values=pixels).pooler_output.float(), dim=-1)

    def embed_text(self, texts):
        """Unit-length embeddings [N, D] of N texts."""
        ids = tokenize(self.tokenizer, texts).to(self.clip.device)
        return F.normalize(self.clip.get_text_features(input_ids=ids).pooler_output.float(), dim=-1)

    def describe(self):
        """What a result says of it."""
        return {"network": f"CLIP{self.suffix.replace('_', ' ')}", "weights": self.path, "sha256": self.sha256,
                "dimension": self.dimension}


class InceptionFeatures:
    """Pool features [N, 2048] of the Inception-v3 of torch-fidelity, from 8-bit images as TensorFlow 1 resizes them."""

    dimension, suffix = 2048, ""

    def __init__(self, network, path, sha256):
        self.network, self.path, self.sha256 = network, path, sha256

    def to(self, device):
        """Move the network."""
        self.network.to(device)

    def __call__(self, images):
        """Features [N, 2048], fp32, of images [N, 3, H, W] in [0, 1]."""
        return self.network((images * 255).round().to(torch.uint8))[0].float()

    def describe(self):
        """What a result says of it."""
        return {"network": "Inception-v3 (torch-fidelity)", "weights": self.path, "sha256": self.sha256,
                "dimension": self.dimension}


def tokenize(tokenizer, texts):
    """Token ids [N, L], padded and cut to the tokenizer's length."""
    ids = tokenizer(list(texts), padding="max_length", truncation=True, max_length=tokenizer.model_max_length,
                    return_attention_mask=False, return_tensors="np").input_ids    # half the time of "pt"
    return torch.from_numpy(ids)


def load_features(spec, device):
    """A feature network from `clip:FOLDER` or `inception:FILE`. Raises UserError if it is not there."""
    kind, _, path = spec.partition(":")
    if kind not in ("clip", "inception") or not path:
        raise UserError(f"--features {spec}: must be clip:FOLDER or inception:FILE")
    return (load_clip if kind == "clip" else load_inception)(path, device)


def load_clip(folder, device):
    """ClipFeatures of a transformers folder, in fp32. Raises UserError if it is not there or broken."""
    from transformers import AutoTokenizer, CLIPModel

    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"no CLIP in {folder} (config.json is missing); a transformers folder is needed, "
                        "of which `sidfast teacher` trains a small one")
    refuse_pickles(folder, "CLIP", "transformers.CLIPModel")
    try:
        clip = CLIPModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        mean, std = _normalisation(folder)
    except Exception as error:                           # the library raises many kinds for a broken folder
        raise UserError(f"the CLIP in {folder} cannot be loaded ({_first_line(error)})") from None
    clip = clip.to(device).eval().requires_grad_(False)
    return ClipFeatures(clip, tokenizer, mean, std, str(folder), hash_files(sorted(folder.glob("*.safetensors"))))


def load_inception(path, device):
    """InceptionFeatures of a file of weights as torch-fidelity publishes it. Raises UserError if it is none."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = Path(path)
    if not path.is_file():
        raise UserError(f"--features inception:{path}: no such file; the weights are at {INCEPTION_URL}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        with tempfile.TemporaryDirectory() as folder:    # torch-fidelity unpickles what it is given: give it our own
            clean = os.path.join(folder, "inception.pth")
            torch.save(dict(state), clean)
            network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], clean)
    except Exception as error:                           # torch raises many kinds for a broken file
        raise UserError(f"--features inception:{path}: no Inception-v3 weights of torch-fidelity "
                        f"({_first_line(error)})") from None
    return InceptionFeatures(network.to(device), str(path), hash_files([path]))


def hash_files(paths, root=None):
    """SHA-256 of the contents of files, in the given order; with `root`, of their names below it too."""
    total = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            digest = hashlib.sha256()
            while part := file.read(2**20):
                digest.update(part)
        total.update((f"{path.relative_to(root)}\0" if root else "").encode(errors="surrogateescape") + digest.digest())
    return total.hexdigest()


def _normalisation(folder):
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor.from_pretrained(folder)
    return processor.image_mean, processor.image_std


def _first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
