"""`sidfast evaluate` against torch-fidelity, torchmetrics and numpy on the same stored images and weights."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Forked
from helpers_evaluate import ASSETS, arguments, run, shapes_judge
from PIL import Image
from random_judges import write_inception
from scipy import linalg
from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from sidfast import cli
from sidfast.data import shapes
from sidfast.evaluation import metrics
from sidfast.evaluation.evaluate import held_out_captions
from sidfast.evaluation.features import load_clip, load_features
from sidfast.evaluation.images import ImageFolder
from sidfast.evaluation.judge import FeatureExtractors
from sidfast.evaluation.metrics import diversity
from sidfast.evaluation.reference import Reference, drawn_reference
from sidfast.evaluation.results import read_groups
from sidfast.evaluation.rows import FolderRows, MemoryRows, collect

CLIP = ASSETS / "clip"


N = 300                                                  # more than the 128 features of the small CLIP


def draw(n, seed, shift=0.0):
    """True images of held-out captions as 8-bit arrays [n, 64, 64, 3]; `shift` brightens them."""
    scenes = shapes.parse_captions(held_out_captions(n))
    images = (shapes.draw(scenes, torch.Generator().manual_seed(seed)) + 1) / 2 + shift
    return (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def write_images(folder, images):
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:05d}.png")
    return folder


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Two folders of images, `real` and `made` (drawn brighter), and the prompts."""
    root = tmp_path_factory.mktemp("stored")
    write_images(root / "real", draw(N, 1))
    write_images(root / "made", draw(N, 2, 0.1))
    (root / "prompts.txt").write_text("\n".join(held_out_captions(N)) + "\n")
    return root


def options(stored, **changes):
    values = {"model": str(stored / "made"), "prompts": str(stored / "prompts.txt"), "features": f"clip:{CLIP}",
              "reference": str(stored / "real"), "clip": str(CLIP), "cache": str(stored / "cache")}
    return values | {name: str(value) for name, value in changes.items()}


ALL = "fid,kid,clip,precision,recall"


@pytest.fixture(scope="module")
def result(stored):
    return run(options(stored, metrics=ALL), stored / "result.json")


class SmallClip(torch.nn.Module):
    """The features of the small CLIP for torch-fidelity, from transformers' own processor."""

    def __init__(self):
        super().__init__()
        self.clip = CLIPModel.from_pretrained(CLIP, dtype=torch.float32).eval()
        self.processor = CLIPImageProcessor.from_pretrained(CLIP)

    def forward(self, images):
        pixels = self.processor(images=list(images), return_tensors="pt").pixel_values
        return F.normalize(self.clip.get_image_features(pixel_values=pixels).pooler_output, dim=-1) * 1000**0.5


@pytest.fixture(scope="module")
def independent(stored):
    """What torch-fidelity finds in the same two folders with the same weights."""
    import torch_fidelity
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    class Extractor(FeatureExtractorBase):
        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)
            self.network = SmallClip()

        def forward(self, images):
            return (self.network(images),)

        @staticmethod
        def get_provided_features_list():
            return ("clip",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "clip"

        @staticmethod
        def can_be_compiled():
            return False

        @staticmethod
        def get_dummy_input_for_compile():
            return None

    torch_fidelity.register_feature_extractor("small-clip", Extractor)
    with torch.no_grad():
        return torch_fidelity.calculate_metrics(
            input1=str(stored / "made"), input2=str(stored / "real"), feature_extractor="small-clip", fid=True,
            kid=True, prc=True, kid_subset_size=N // 2, cuda=False, cache=False, verbose=False, batch_size=50,
            save_cpu_ram=True)


@pytest.mark.parametrize("ours, theirs", [
    ("fid_small_clip", "frechet_inception_distance"), ("kid_small_clip", "kernel_inception_distance_mean"),
    ("kid_std_small_clip", "kernel_inception_distance_std"), ("precision_small_clip", "precision"),
    ("recall_small_clip", "recall")])
def test_equals_torch_fidelity(result, independent, ours, theirs):
    assert result["metrics"][ours] == pytest.approx(independent[theirs], rel=1e-3)


def test_clip_score_equals_torchmetrics(stored, result):
    from torchmetrics.multimodal.clip_score import CLIPScore

    model = CLIPModel.from_pretrained(CLIP, dtype=torch.float32).eval()
    get = {name: getattr(model, name) for name in ("get_image_features", "get_text_features")}
    for name, method in get.items():                     # (torchmetrics 1.9 expects what transformers 4 returned)
        setattr(model, name, lambda *args, method=method: method(*args).pooler_output)
    processor = CLIPProcessor(CLIPImageProcessor.from_pretrained(CLIP), CLIPTokenizer.from_pretrained(CLIP))
    score = CLIPScore(lambda: (model, processor))
    images = [torch.from_numpy(image).permute(2, 0, 1) for image in draw(N, 2, 0.1)]
    with torch.no_grad():
        score.update(images, held_out_captions(N))
    assert result["metrics"]["clip_score"] == pytest.approx(score.compute().item() / 100, rel=1e-3)


def test_fid_equals_the_formula(stored, result):
    """numpy and scipy: |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))."""
    network = SmallClip()
    with torch.no_grad():
        a, b = (network(torch.from_numpy(draw(N, *args)).permute(0, 3, 1, 2)).double().numpy()
                for args in ((1,), (2, 0.1)))
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(s1 @ s2).real
    want = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(s1 + s2 - 2 * root)
    assert result["metrics"]["fid_small_clip"] == pytest.approx(want, rel=1e-4)


def test_two_processes_agree_with_one(stored, result):
    """Each takes its share of the blocks; a cache of their own, so the reference is shared out too."""
    out = stored / "two.json"
    command = arguments(options(stored, metrics=ALL, cache=stored / "cache2"), out)
    both = [Forked("cli", command, 29871, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                   MASTER_ADDR="127.0.0.1") for rank in range(2)]                # as torchrun does
    for process in both:
        assert process.wait(300) == 0, process.stderr.read()[-3000:]
    two = json.loads(out.read_text())
    assert two["processes"] == 2
    for name, value in result["metrics"].items():
        assert two["metrics"][name] == pytest.approx(value, rel=1e-5 if name.startswith("kid") else 1e-6), name


def test_result_says_what_it_means(stored, result):
    assert result["model"]["files"] == N and result["images"] == N
    assert result["reference"]["images"] == N and result["reference"]["source"] == str(stored / "real")
    assert result["features"]["network"] == "CLIP small clip" and result["features"]["dimension"] == 128
    hashes = [result[k]["sha256"] for k in ("model", "prompts", "reference", "features")]
    assert len(set(hashes)) == 4 and all(len(h) == 64 for h in hashes)
    assert {"torch", "torchmetrics", "torch-fidelity"} <= result["versions"].keys()
    assert not list(stored.glob(".result*"))


def test_a_result_is_replaced(stored, result, tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(result | {"metrics": {"fid": float("nan")}}))
    assert run(options(stored, metrics=ALL), tmp_path / "r.json")["metrics"] == result["metrics"]


def test_reference_is_computed_once(stored, result, monkeypatch):
    """The second time its features come from the cache, under the hash of its contents."""
    from sidfast.evaluation import images

    before = images.ImageFolder.__call__

    def counted(self, start, stop):
        assert self.option == "--model", "the reference was read again"
        return before(self, start, stop)

    monkeypatch.setattr(images.ImageFolder, "__call__", counted)
    again = run(options(stored, metrics=ALL), stored / "again.json")
    assert again["metrics"] == result["metrics"]         # exact: same bits


def test_statistics_as_reference(stored, result, tmp_path):
    network = SmallClip()
    with torch.no_grad():
        real = network(torch.from_numpy(draw(N, 1)).permute(0, 3, 1, 2)).double().numpy()
    np.savez(tmp_path / "real.npz", mu=real.mean(0), sigma=np.cov(real, rowvar=False))
    got = run(options(stored, metrics="fid", reference=tmp_path / "real.npz"), tmp_path / "r.json")
    assert got["metrics"]["fid_small_clip"] == pytest.approx(result["metrics"]["fid_small_clip"], rel=1e-4)


def test_true_world_is_near_and_a_shifted_one_far():
    """FID of two disjoint samples of the true world is small and falls with n as 1/n; a shifted world is far."""
    judge = FeatureExtractors(load_clip(CLIP, "cpu"))
    captions, drawn = held_out_captions(1000), torch.from_numpy(draw(1000, 5)).permute(0, 3, 1, 2) / 255
    references = {n: drawn_reference(captions[:n], judge) for n in (200, 1000)}

    def measured(n, shift=0.0):
        rows = MemoryRows()
        collect(lambda start, stop: drawn[start:stop] + shift, captions[:n], judge.rows, rows, 50, "measure")
        return metrics.fid(rows, references[n])

    few, many = measured(200), measured(1000)
    assert 0 < many < 0.35 * few                         # 1/5 in the limit
    assert measured(200, 0.2) > 3 * few


def test_tf32_is_asked_for_and_written_down(stored, tmp_path, monkeypatch):
    """fp32 is fp32 unless told; afterwards the process is as it was before, and the results count as different."""
    states, before = [], (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
    measure = FeatureExtractors.rows

    def rows(*args):
        states.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return measure(*args)

    monkeypatch.setattr(FeatureExtractors, "rows", rows)
    values = options(stored, images=130, batch_size=130, cache=tmp_path / "cache")
    for name, more in (("fp32", []), ("tf32", ["--tf32"])):
        assert cli.main(arguments(values, tmp_path / f"{name}.json") + more) == 0
    assert states == [("highest", False), ("high", True)]
    caches = [json.loads(f.read_text())["products"] for f in (tmp_path / "cache" / "reference").glob("*/key.json")]
    assert sorted(caches) == ["high", "highest"]
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before
    assert [json.loads((tmp_path / f"{name}.json").read_text())["tf32"] for name in ("fp32", "tf32")] == [False, True]
    assert len(read_groups([str(tmp_path / "fp32.json"), str(tmp_path / "tf32.json")])) == 2


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """A file of random weights of the true architecture, as torch-fidelity's own file has them."""
    return write_inception(tmp_path_factory.mktemp("inception") / "inception.pth")


@pytest.mark.slow
def test_inception_equals_torch_fidelity(stored, inception, tmp_path):
    """Six images of each: the command would ask for more than 2048 for a FID."""
    import torch_fidelity

    both = []
    network = load_features(f"inception:{inception}", "cpu")
    for name in ("made", "real"):
        (tmp_path / name).mkdir()
        for i in range(6):
            shutil.copy(stored / name / f"{i:05d}.png", tmp_path / name)
        rows = MemoryRows()
        rows.put(0, FeatureExtractors(network).reference_rows(ImageFolder(tmp_path / name, "--model")(0, 6), None))
        both.append(rows)
    theirs = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "made"), input2=str(tmp_path / "real"), feature_extractor="inception-v3-compat", fid=True,
        kid=True, prc=True, kid_subset_size=3, feature_extractor_weights_path=str(inception), cuda=False, cache=False,
        verbose=False, batch_size=6)
    ours = metrics.compute(both[0], {"fid", "kid", "precision", "recall"}, Reference("real", "", 6, rows=both[1]))
    for name, key in (("fid", "frechet_inception_distance"), ("kid", "kernel_inception_distance_mean"),
                      ("precision", "precision"), ("recall", "recall")):
        assert ours[name] == pytest.approx(theirs[key], rel=1e-3), name


def test_diversity_is_the_mean_pairwise_distance(stored, tmp_path):
    """Against torchmetrics' pairwise similarity; and through the command, with three images of a prompt."""
    from torchmetrics.functional.pairwise import pairwise_cosine_similarity

    with torch.no_grad():
        embeddings = load_clip(CLIP, "cpu").embed(torch.from_numpy(draw(60, 3)).permute(0, 3, 1, 2) / 255)
    want = []
    for group in embeddings.unflatten(0, (20, 3)):
        upper = torch.triu_indices(3, 3, 1)
        want.append(1 - pairwise_cosine_similarity(group, group)[upper[0], upper[1]].mean().item())
    assert diversity(embeddings, 3).mean().item() == pytest.approx(np.mean(want), rel=1e-4)
    got = run(options(stored, metrics="diversity", seeds_per_prompt=3, images=300), tmp_path / "r.json")["metrics"]
    assert 0 < got["diversity_small_clip"] < 1


def test_one_evaluation_at_a_time(stored, result, tmp_path, capsys, monkeypatch):
    """A second command with the same --out, of other images and while the first is at work, is refused in a line."""
    put, tried = FolderRows.put, []

    def meanwhile(self, start, rows):
        if "clip_cosine" in rows and not tried:
            tried.append(cli.main(arguments(options(stored, metrics=ALL, model=stored / "real"), tmp_path / "r.json")))
        put(self, start, rows)

    monkeypatch.setattr(FolderRows, "put", meanwhile)
    again = run(options(stored, metrics=ALL), tmp_path / "r.json")
    assert tried == [2] and "r.json: another `sidfast evaluate` is at work on it" in capsys.readouterr().err
    assert again["metrics"] == result["metrics"] and os.listdir(tmp_path) == ["r.json"]


def test_drawn_reference_ignores_how_it_is_stored(tmp_path):
    from sidfast.evaluation.processes import Group

    judge, captions = shapes_judge(), held_out_captions(300)
    memory = drawn_reference(captions, judge)
    folder = drawn_reference(captions, judge, tmp_path, Group())
    assert torch.equal(memory.rows.all("features"), folder.rows.all("features")) and memory.sha256 == folder.sha256
