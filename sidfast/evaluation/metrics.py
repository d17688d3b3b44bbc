"""Numbers out of what was measured on each image: FID, KID, precision and recall, CLIP score, diversity, accuracy.

The definitions are those of torchmetrics (FID) and torch-fidelity (KID, precision, recall), given features in place of
images. Their names end in the feature network's suffix: `fid_small_clip` is no Inception FID and compares with none.
"""

import difflib

import torch
from torch import nn

from sidfast.common.errors import UserError
from sidfast.evaluation.attributes import ATTRIBUTES
from sidfast.evaluation.intervals import clipped, of_mean, of_repeats, of_share

METRICS = ("fid", "kid", "clip", "precision", "recall", "diversity", "accuracy")
OF_FEATURES = {"fid", "kid", "precision", "recall"}
_OF_SAMPLES = {"kid", "precision", "recall"}             # of single images of the reference, not of its statistics
_KID_SUBSETS = 100
_NEIGHBOURS = 3


def parse_metrics(text):
    """A set of METRICS from a list with commas. Raises UserError for an unknown one."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in METRICS:
            near = difflib.get_close_matches(name.lower(), METRICS, 1, 0.3)
            meant = f"; is {near[0]} meant?" if near else ""
            raise UserError(f"--metrics: unknown metric {name}{meant} (there are {', '.join(METRICS)})")
    if not names:
        raise UserError(f"--metrics: none given (there are {', '.join(METRICS)})")
    return set(names)


def check_count(metrics, images, dimension, whose):
    """Raise UserError if a metric is undefined for so few images. `whose`: how the message calls them."""
    if "fid" in metrics and images <= dimension:
        raise UserError(f"{whose}: {images} are too few images for the covariance of {dimension} features; FID needs "
                        f"{dimension + 1} at least, KID needs fewer")
    if metrics & _OF_SAMPLES and images <= _NEIGHBOURS:
        raise UserError(f"{whose}: {images} images are too few; KID, precision and recall need {_NEIGHBOURS + 1}")


def check_reference(metrics, reference, folder):
    """Raise UserError if a metric needs single images of the reference and there are only its statistics."""
    missing = sorted(metrics & _OF_SAMPLES)
    if missing and folder is None:
        raise UserError(f"--reference {reference.source}: has mean and covariance only; {', '.join(missing)} "
                        "need the images")


def names(metrics, suffix="", clip_suffix=""):
    """The names of what `compute` gives."""
    found = ["accuracy", *(f"accuracy_{name}" for name in ATTRIBUTES)] if "accuracy" in metrics else []
    found += ["clip_score"] if "clip" in metrics else []
    for metric, of in (("fid", ("fid",)), ("kid", ("kid", "kid_std")), ("precision", ("precision",)),
                       ("recall", ("recall",))):
        found += [name + suffix for name in of] if metric in metrics else []
    return [*found, f"diversity{clip_suffix}"] if "diversity" in metrics else found


def lower_is_better(name):
    """Whether a smaller number of a metric in a result is the better one."""
    return name.startswith(("fid", "kid"))


def is_share(name):
    """Whether a metric in a result is a share of the images, between 0 and 1."""
    return name.startswith(("accuracy", "precision", "recall"))


def over_repeats(each):
    """{name: (mean, (low, high) or None)} of several {metric: value}, by Student's t."""
    return {name: of_repeats([metrics[name] for metrics in each], is_share(name)) for name in each[0]}


def title(name):
    """A metric's name in a result as people read it: "FID (small CLIP)"."""
    network = next((words for end, words in (("_small_clip", "small CLIP"), ("_clip", "CLIP")) if name.endswith(end)),
                   "Inception" if name in ("fid", "kid", "kid_std", "precision", "recall") else None)
    bare = name.removesuffix("_clip").removesuffix("_small")
    words = {"fid": "FID", "kid": "KID", "kid_std": "KID's deviation", "clip_score": "CLIP score"}
    return words.get(bare, bare.replace("_", " of ", 1)) + (f" ({network})" if network else "")


def compute(rows, metrics, reference=None, suffix="", clip_suffix="", per_prompt=1):
    """The metrics as plain numbers, {name: value}.

    `rows`: of the images; `reference`: a Reference, for the metrics in features; `per_prompt`: images of a prompt.
    """
    result = {}
    if "accuracy" in metrics:
        result |= accuracy(rows)
    if "clip" in metrics:
        result["clip_score"] = rows.all("clip_cosine").double().mean().item()
    if "fid" in metrics:
        result[f"fid{suffix}"] = fid(rows, reference)
    if "kid" in metrics:
        result |= {name + suffix: value for name, value in kid(rows, reference).items()}
    if metrics & {"precision", "recall"}:
        both = precision_recall(rows, reference)
        result |= {name + suffix: both[name] for name in ("precision", "recall") if name in metrics}
    if "diversity" in metrics:
        result[f"diversity{clip_suffix}"] = diversity(rows.all("clip_embedding"), per_prompt).mean().item()
    return result


def intervals(rows, metrics, clip_suffix="", per_prompt=1):
    """95 % intervals {name: (low, high)} of those metrics that are means over images (sidfast/evaluation/intervals.py).

    Images of one prompt are no independent samples, so with several the means over each prompt are what is counted.
    """
    found = {}
    if "accuracy" in metrics:
        for name in ("all", *ATTRIBUTES):
            flags = rows.all(f"right_{name}")
            name = "accuracy" if name == "all" else f"accuracy_{name}"
            interval = of_share(flags) if per_prompt == 1 else of_mean(_over_prompts(flags, per_prompt))
            found[name] = interval and clipped(interval)
    if "clip" in metrics:
        found["clip_score"] = of_mean(_over_prompts(rows.all("clip_cosine"), per_prompt))
    if "diversity" in metrics:
        found[f"diversity{clip_suffix}"] = of_mean(diversity(rows.all("clip_embedding"), per_prompt))
    return {name: interval for name, interval in found.items() if interval is not None}


def _over_prompts(values, per_prompt):
    """Means [prompts] of values [images]; the last prompt may have fewer images than the others."""
    return torch.stack([part.double().mean() for part in values.split(per_prompt)])


def accuracy(rows):
    """Share of images that show everything in their caption ("accuracy"), and each attribute of it."""
    shares = {name: rows.all(f"right_{name}").double().mean().item() for name in ("all", *ATTRIBUTES)}
    return {"accuracy": shares.pop("all")} | {f"accuracy_{name}": value for name, value in shares.items()}


class _Stored(nn.Module):
    """Stands in for torchmetrics' feature network where the features are already there."""

    def __init__(self, dimension):
        super().__init__()
        self.num_features = dimension

    def forward(self, features):
        return features


def fid(rows, reference):
    """Frechet distance of the features to the reference's (arXiv 1706.08500), in fp64, one block at a time."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = None
    for features in rows.blocks("features"):
        metric = metric or FrechetInceptionDistance(_Stored(features.shape[1]), sync_on_compute=False)
        metric.to(features.device)                       # (no sync: these are the blocks of all processes already)
        metric.update(features, real=False)
    if reference.rows is None:                           # the sums that any two images of these statistics have
        mu, sigma = (v.to(metric.fake_features_sum) for v in reference.statistics)
        metric.real_features_sum, metric.real_features_num_samples = 2 * mu, torch.tensor(2).to(mu.device)
        metric.real_features_cov_sum = sigma + 2 * torch.outer(mu, mu)
    else:
        for features in reference.rows.blocks("features"):
            metric.update(features.to(metric.fake_features_sum.device), real=True)
    return metric.compute().item()


def kid(rows, reference):
    """Kernel distance (arXiv 1801.01401): mean and deviation over random subsets, drawn with a fixed seed.

    All features are in memory at once, [images, D] in fp32.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    ours, real = (r.all("features").cpu() for r in (rows, reference.rows))
    both = kid_features_to_metric(ours, real, kid_subsets=_KID_SUBSETS, verbose=False,
                                  kid_subset_size=kid_subset_size(len(ours), len(real)))
    return {"kid": both[KEY_METRIC_KID_MEAN], "kid_std": both[KEY_METRIC_KID_STD]}


def kid_subset_size(images, reference_images):
    """1000 as usual, but at most half of the images, so that subsets differ."""
    return min(1000, images // 2, reference_images // 2)


def precision_recall(rows, reference):
    """Improved precision and recall (arXiv 1904.06991), radius: the third neighbour.

    All features are in memory at once, and distances of a thousand images to all others.
    """
    from torch_fidelity.metric_prc import prc_features_to_metric

    ours, real = (r.all("features").cpu() for r in (rows, reference.rows))
    return prc_features_to_metric(ours, real, prc_neighborhood=_NEIGHBOURS, prc_batch_size=1000, save_cpu_ram=True,
                                  verbose=False)


def diversity(embeddings, per_prompt):
    """Mean cosine distance [prompts] between two images of a prompt: unit vectors [prompts * per_prompt, E] in that
    order."""
    groups = embeddings.double().unflatten(0, (-1, per_prompt))
    pairs = per_prompt * (per_prompt - 1)
    return 1 - (groups.sum(1).square().sum(-1) - groups.square().sum((1, 2))) / pairs


def settings(metrics, images, reference_images):
    """The constants behind the numbers, for the result."""
    known = {}
    if "kid" in metrics:
        known["kid"] = {"kernel": "polynomial, degree 3", "subsets": _KID_SUBSETS,
                        "subset_size": kid_subset_size(images, reference_images), "seed": 2020}
    if metrics & {"precision", "recall"}:
        known["precision_recall"] = {"neighbours": _NEIGHBOURS}
    return known
