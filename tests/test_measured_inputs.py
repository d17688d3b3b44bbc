"""What evaluations, grids and samples look at: captions, filters, CLIP's own preprocessing, seeds; and the same things
after an interruption."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers_evaluate import ASSETS, arguments, run
from helpers_input import edit
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, CLIPModel

from sidfast import cli
from sidfast.accel.precision import allow_tf32, tf32
from sidfast.common.errors import INTERRUPTED
from sidfast.data import shapes
from sidfast.evaluation.evaluate import held_out_captions
from sidfast.evaluation.features import load_clip
from sidfast.evaluation.images import ImageFolder, sized
from sidfast.evaluation.judge import FeatureExtractors
from sidfast.evaluation.metrics import lower_is_better
from sidfast.evaluation.protocol import EvaluationOptions, EvaluationSpec
from sidfast.evaluation.reference import measure_reference, open_reference
from sidfast.evaluation.rows import FolderRows
from sidfast.publishing.export import write_export
from sidfast.publishing.grid import image_grid
from sidfast.publishing.load import load_pipeline
from sidfast.runs.preview import Preview
from sidfast.teachers.load import load_teacher

CLIP, CPU = ASSETS / "clip", torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Images of noise, 96 x 96, and a prompt for each."""
    root, rng = tmp_path_factory.mktemp("place"), np.random.default_rng(0)
    (root / "images").mkdir()
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (96, 96, 3), np.uint8)).save(root / "images" / f"{i}.png")
    (root / "prompts.txt").write_text("".join(f"cat number {i}\n" for i in range(8)))
    return root


@pytest.fixture(scope="module")
def other_clip(tmp_path_factory):
    """The small CLIP with other weights, which was trained on pixels of another mean and deviation."""
    folder = shutil.copytree(CLIP, tmp_path_factory.mktemp("clip") / "clip")
    edit("preprocessor_config.json", image_mean=[0.48, 0.46, 0.41], image_std=[0.27, 0.26, 0.28])(folder)
    weights = load_file(folder / "model.safetensors")
    weights["visual_projection.weight"] = weights["visual_projection.weight"].flip(1).contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_captions_of_an_evaluation_are_held_out():
    assert shapes.is_held_out(shapes.parse_captions(held_out_captions(500))).all()


def test_the_filter_that_was_asked_for(place, tmp_path):
    """Through the command: its CLIP score is that of images which were brought to the size by that filter."""
    judge, folder = FeatureExtractors(clip=load_clip(CLIP, CPU)), ImageFolder(place / "images", "--model")
    prompts, scores = (place / "prompts.txt").read_text().splitlines(), set()
    for name in ("bicubic", "bilinear", "lanczos"):
        got = run({"model": str(place / "images"), "prompts": str(place / "prompts.txt"), "clip": str(CLIP),
                   "metrics": "clip", "resize": "64", "filter": name}, tmp_path / f"{name}.json")
        want = judge.rows(sized(folder, 64, name)(0, 8), prompts)["clip_cosine"].double().mean().item()
        assert got["metrics"]["clip_score"] == pytest.approx(want, rel=1e-5), name
        scores.add(round(want, 5))
    assert len(scores) == 3


@pytest.mark.parametrize("side", [64, 150])
def test_a_clip_sees_what_its_processor_makes(other_clip, side):
    """Antialiased, and with the mean and deviation of its folder; within what the processor's 8 bits lose."""
    images = torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = CLIPImageProcessor.from_pretrained(other_clip)(images=list(images), return_tensors="pt").pixel_values
    clip = CLIPModel.from_pretrained(other_clip, dtype=torch.float32)
    with torch.no_grad():
        want = F.normalize(clip.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        got = load_clip(other_clip, CPU).embed(images / 255)
    assert (got - want).norm(dim=1).max() < 0.01


def test_a_reference_is_cached_for_each_network(place, other_clip, tmp_path):
    for folder in (CLIP, other_clip, CLIP):
        judge = FeatureExtractors(features=load_clip(folder, CPU))
        reference, images = open_reference(place / "images")
        got = measure_reference(reference, images, judge, tmp_path, None).rows.all("features")
        assert torch.allclose(got, judge.reference_rows(images(0, 8), None)["features"], atol=1e-5)
    assert len(list((tmp_path / "reference").iterdir())) == 2


def test_images_of_a_prompt_stand_together(place):
    protocol = EvaluationSpec(EvaluationOptions(
        prompts=str(place / "prompts.txt"), images=6, seeds_per_prompt=3, clip=str(CLIP), metrics="clip,diversity"),
                              CPU)
    assert protocol.prompts == ["cat number 0"] * 3 + ["cat number 1"] * 3


@pytest.mark.parametrize("name, lower", [("fid", True), ("fid_small_clip", True), ("kid_clip", True), ("recall", False),
                                         ("clip_score", False), ("accuracy", False), ("diversity_clip", False)])
def test_which_way_is_better(name, lower):
    assert lower_is_better(name) is lower


def test_tf32_is_afterwards_as_it_was_before():
    """Whichever way it was, and however the block ends."""
    def state():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    with tf32(False):                                    # (puts back what this process has)
        for allowed in (False, True):
            allow_tf32(allowed)
            before = state()
            with pytest.raises(KeyError), tf32(not allowed):
                assert state() == (("highest", False) if allowed else ("high", True))
                raise KeyError
            assert state() == before


# ---- interrupted evaluations

@pytest.fixture
def begun(place, tiny_teacher, tmp_path, monkeypatch):
    """(options, the result's path) of an evaluation of a one-step model that was interrupted after its first block."""
    teacher, options = load_teacher(str(tiny_teacher)), {
        "model": str(tmp_path / "export"), "prompts": str(tmp_path / "prompts.txt"), "clip": str(CLIP),
        "metrics": "clip", "images": "8", "batch_size": "4", "resize": "64"}
    write_export(teacher.one_step_pipeline(teacher.network, 625), tmp_path / "export")
    shutil.copy(place / "prompts.txt", tmp_path)
    put = FolderRows.put

    def interrupted(self, start, rows):
        if start:
            raise KeyboardInterrupt
        put(self, start, rows)

    with monkeypatch.context() as patch:
        patch.setattr(FolderRows, "put", interrupted)
        assert cli.main(arguments(options, tmp_path / "r.json")) == INTERRUPTED
    assert (tmp_path / ".r.json.partial" / "block-00000000.safetensors").is_file()
    return options, tmp_path / "r.json"


def other_weights(folder):
    path = folder / "export" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_out.weight"] = -weights["conv_out.weight"]
    save_file(weights, path, {"format": "pt"})
    return {}


def other_prompts(folder):
    path = folder / "prompts.txt"
    path.write_text(path.read_text().replace("cat", "dog"))
    return {}


@pytest.mark.parametrize("change", [lambda _: {"seed_offset": "500"}, other_weights, other_prompts,
                                    lambda _: {"filter": "bilinear"}], ids=["seeds", "weights", "prompts", "filter"])
def test_blocks_of_something_else_are_not_taken(begun, tmp_path, capsys, change):
    """The numbers are those of a fresh evaluation of what is there now."""
    options, out = begun
    options |= change(tmp_path)
    got, fresh = run(options, out), run(options, tmp_path / "fresh.json")
    assert "was of another evaluation; starting afresh" in capsys.readouterr().err
    assert got["metrics"] == fresh["metrics"] and got["resumed_after"] == 0


def test_blocks_of_the_same_are_taken(begun, tmp_path):
    options, out = begun
    got, fresh = run(options, out), run(options, tmp_path / "fresh.json")
    assert got["metrics"] == fresh["metrics"] and got["resumed_after"] == 4


# ---- noise of grids and samples

def test_images_of_a_grid_have_seeds_of_their_own():
    """Also where they are made one after the other, because they are large."""
    class Pipe:
        def set_progress_bar_config(self, **_):
            pass

        def __call__(self, prompts, generator, **_):
            return SimpleNamespace(images=[noise.initial_seed() for noise in generator])

    preview = object.__new__(Preview)
    preview.size, preview.prompts = (300, 300), ["a prompt"] * 5                        # (two of them at once)
    assert preview._images(Pipe()) == [0, 1, 2, 3, 4]


def test_seeds_of_samples(tiny_teacher, tmp_path):
    out, prompts = tmp_path / "grid.png", ["a red circle", "x"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    assert cli.main(["sample", "--model", str(tiny_teacher), "--prompts", str(tmp_path / "prompts.txt"), "--steps", "2",
                     "-n", "2", "--seed", "7", "--out", str(out)]) == 0
    pipe, _ = load_pipeline(tiny_teacher, CPU)
    pipe.set_progress_bar_config(disable=True)
    rows = {f"seed {seed}": [pipe(text, num_inference_steps=2, guidance_scale=1.5, generator=torch.Generator()
                                  .manual_seed(seed)).images[0] for text in prompts] for seed in (7, 8)}
    assert np.array_equal(np.array(Image.open(out)), np.array(image_grid(rows, prompts)))
    assert rows["seed 7"][0].tobytes() != rows["seed 8"][0].tobytes()
