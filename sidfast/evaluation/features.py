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

from sidfast.common.errors import UserError, first_reason
from sidfast.common.extras import need
from sidfast.data import shapes
from sidfast.evaluation.preprocessing import Preprocessing, read_preprocessing
from sidfast.teachers.clip import tokenize
from sidfast.teachers.compatibility import check_tokenizer
from sidfast.teachers.folders import find_network, is_hub_id
from sidfast.teachers.load import check_finite_weights, load_network
from sidfast.teachers.untrusted import read_config, refuse_pickles

INCEPTION_URL = ("https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
                 "weights-inception-2015-12-05-6726825d.pth")
_NO_LENGTH = 10**9                                       # transformers says 10^30 where no file gives one


class ClipFeatures:
    """A CLIP's image and text embeddings.

    Called as a feature network it gives the unit-length image embeddings times sqrt(1000), [N, D], so that a FID comes
    out in thousandths of the embedding's own. `preprocess`: the Preprocessing that the CLIP was trained with; that of
    the small CLIP by default.
    """

    def __init__(self, clip, tokenizer, preprocess=None, path=None, sha256=None, revision=None):
        self.clip, self.tokenizer, self.path, self.sha256, self.revision = clip, tokenizer, path, sha256, revision
        side = clip.config.vision_config.image_size
        self.preprocess = preprocess or Preprocessing(side, resize=(side, side))
        self.dimension = clip.config.projection_dim
        self.suffix = "_small_clip" if side == shapes.IMAGE_SIZE else "_clip"          # no published CLIP is so small

    def __call__(self, images):
        """Features [N, D] of images [N, 3, H, W] in [0, 1]."""
        return self.scale(self.embed(images))

    def to(self, device):
        """Move the network."""
        self.clip.to(device)

    @staticmethod
    def scale(embeddings):
        """The features [N, D] that belong to embeddings [N, D]."""
        return embeddings * 1000**0.5

    def embed(self, images):
        """Unit-length embeddings [N, D], fp32, of images [N, 3, H, W] in [0, 1]."""
        pixels = self.preprocess(images)
        return self._unit(self.clip.get_image_features(pixel_values=pixels).pooler_output.float(), "images")

    def embed_text(self, texts):
        """Unit-length embeddings [N, D] of N texts."""
        ids = tokenize(self.tokenizer, texts).to(self.clip.device)
        return self._unit(self.clip.get_text_features(input_ids=ids).pooler_output.float(), "texts")

    def _unit(self, embeddings, kind):
        if not embeddings.any(1).all():
            raise UserError(f"--clip: the network gives embeddings of {kind} that are all 0; its projection has no "
                            "weights, it seems")
        return F.normalize(embeddings, dim=-1)

    def describe(self):
        """What a result says of it."""
        return {"network": f"CLIP{self.suffix.replace('_', ' ')}", "weights": self.path, "sha256": self.sha256,
                "dimension": self.dimension, "preprocessing": self.preprocess.describe(),
                **({"revision": self.revision} if self.revision else {})}


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


def load_features(spec, device):
    """A feature network from `clip:FOLDER`, `clip:HUB_ID` or `inception:FILE`. Raises UserError if it is not there, or
    broken."""
    kind, _, path = spec.partition(":")
    if kind not in ("clip", "inception") or not path:
        raise UserError(f"--features {spec}: must be clip:FOLDER, clip:OWNER/NAME of the hub, or inception:FILE")
    return load_clip(path, device, f"--features {spec}") if kind == "clip" else load_inception(path, device)


def load_clip(name, device, what=None):
    """ClipFeatures of a transformers folder or hub id, in fp32, every part of which is there and fits the others.

    `what` opens the message of the UserError for a folder where that is not so (default: --clip and the name).
    """
    from transformers import AutoTokenizer, CLIPModel

    what = what or f"--clip {name}"
    folder = find_network(str(name), what)
    if not (folder / "config.json").is_file():
        raise UserError(f"{what}: no CLIP in {folder} (config.json is missing); a transformers folder or hub id is "
                        "needed, and `sidfast teacher` trains a small one")
    refuse_pickles(folder, what, "transformers.CLIPModel")
    config = read_config(folder / "config.json", what)
    if config.get("model_type") != "clip":
        raise UserError(f"{what}: {folder} is not a whole CLIP (config.json: model_type "
                        f"{str(config.get('model_type'))[:60]!r}); one with model_type 'clip', image and text network, "
                        "is needed")
    clip = load_network(folder, CLIPModel, what, dtype=torch.float32)
    side = clip.config.vision_config.image_size
    if not isinstance(side, int):
        raise UserError(f"{what}: {folder}/config.json: image_size must be one whole number, not {side!r}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:                           # the library raises many kinds for a broken folder
        raise UserError(f"{what}: the tokenizer in {folder} cannot be loaded ({first_reason(error)})") from None
    _fit_tokenizer(tokenizer, clip.config.text_config, folder, what)
    preprocess = read_preprocessing(folder, side, what)
    clip = clip.to(device).eval().requires_grad_(False)
    return ClipFeatures(clip, tokenizer, preprocess, str(name), hash_files(sorted(folder.glob("*.safetensors"))),
                        folder.name if is_hub_id(str(name)) else None)           # (the hub's cache: by its commit)


def _fit_tokenizer(tokenizer, config, folder, what):
    """Check a CLIP's tokenizer against its text network; one without a length gets the network's."""
    if type(tokenizer.model_max_length) is int and tokenizer.model_max_length > _NO_LENGTH:
        tokenizer.model_max_length = config.max_position_embeddings
    check_tokenizer(folder, tokenizer, config, what)
    if tokenizer.pad_token is None:
        raise UserError(f"{what}: the tokenizer in {folder} has no pad_token; its files are not all there")
    ids = tokenize(tokenizer, ["a"])[0]
    end = config.eos_token_id                            # the text's embedding is read at its first place;
    last = ids.argmax().item() if end == 2 else None     # at that of the largest id in old configurations
    if end not in ids and (last is None or ids[last] != tokenizer.eos_token_id):
        raise UserError(f"{what}: the tokenizer in {folder} does not end a text with token {end}, at which the network "
                        "reads it (eos_token_id in config.json): it is another model's")


def load_inception(path, device):
    """InceptionFeatures of a file of weights as torch-fidelity publishes it. Raises UserError if it is none, or if a
    weight is missing, unknown or not finite."""
    need("torch_fidelity", "eval", f"--features inception:{path}")
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
                        f"({_mismatch(error)})") from None
    check_finite_weights(network, f"--features inception:{path}")
    return InceptionFeatures(network.to(device), str(path), hash_files([path]))


def _mismatch(error):
    """What is wrong with weights, after PyTorch's heading."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[1][:300] if len(lines) > 1 and lines[0].startswith("Error(s) in loading") else first_reason(error)


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
