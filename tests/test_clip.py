"""A CLIP is used only if all of it is there and fits: weights, tokenizer, preprocessing; nothing it asks for is run."""

import json
import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT
from helpers_input import edit, fails
from PIL import Image
from random_judges import write_inception
from safetensors.torch import load_file, save_file
from test_teacher_files import Hub

from sidfast import cli
from sidfast.common.errors import UserError
from sidfast.evaluation.attributes import load_checker
from sidfast.evaluation.features import load_clip, load_features
from sidfast.evaluation.judge import FeatureExtractors
from sidfast.evaluation.preprocessing import read_preprocessing

ASSETS = ROOT / "assets"
PHOTO = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"          # 600 x 512, in colour
TEXTS = ["a small red circle", "a large blue square on a white background"]


@pytest.fixture
def clip(tmp_path):
    return shutil.copytree(ASSETS / "clip", tmp_path / "clip")


def weights(change):
    """damage(folder): changes the tensors {name: value} of its model.safetensors in place."""

    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return damage


def without(prefix):
    return weights(lambda t: [t.pop(name) for name in list(t) if name.startswith(prefix)])


def nested(section, **values):
    """damage(folder): sets keys of a section of config.json."""

    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        edit("config.json", **{section: config[section] | values})(folder)

    return damage


def text_encoder(folder):
    """A Stable Diffusion's text encoder, with all else that a CLIP's folder has."""
    for path in (ASSETS / "teacher" / "text_encoder").iterdir():
        shutil.copy(path, folder)


@pytest.mark.parametrize("damage, words", [
    (without("vision_model."), "describes a network of 1,083,393 parameters"),
    (without("text_projection."), "lacks 1 of the network's tensors"),
    (weights(lambda t: t.update(extra=torch.ones(3))), "has, but its config.json does not know, 1"),
    (weights(lambda t: t["logit_scale"].fill_(float("nan"))), "logit_scale has values that are not finite"),
    (weights(lambda t: t["visual_projection.weight"][3, 3].fill_(float("inf"))), "not finite"),
    (weights(lambda t: t.update({"visual_projection.weight": torch.ones(128, 64)})),
     "visual_projection.weight is [128, 128] by it, and [128, 64] there"),
    (nested("vision_config", num_hidden_layers=4), "lacks"),
    (nested("text_config", num_hidden_layers=1), "does not know"),
    (text_encoder, "is not a whole CLIP (config.json: model_type 'clip_text_model')"),
    (edit("config.json", model_type="siglip"), "is not a whole CLIP"),
    (lambda f: (f / "tokenizer.json").unlink(), "knows 2 tokens, its text encoder 175"),
    (edit("tokenizer_config.json", model_max_length=77), "gives up to 77 tokens, its text encoder takes 24"),
    (edit("tokenizer_config.json", model_max_length="24"), "gives up to '24' tokens"),
    (nested("text_config", eos_token_id=5), "does not end a text with token 5"),
], ids=["vision", "projection", "extra", "nan", "inf", "shape", "layer-more", "layer-fewer", "text-encoder", "siglip",
        "vocabulary", "long", "length-as-text", "end"])
def test_parts_that_are_missing_or_do_not_fit(clip, damage, words):
    damage(clip)
    for load in (lambda: load_clip(clip, "cpu"), lambda: load_features(f"clip:{clip}", "cpu")):
        with pytest.raises(UserError) as caught:
            load()
        assert words in str(caught.value) and str(clip) in str(caught.value)


@pytest.mark.parametrize("damage, words", [
    (edit("config.json", auto_map={"AutoModel": "evil.Evil"}), "auto_map"),
    (edit("config.json", attn_implementation="someone/kernel"), "attention from the hub"),
    (edit("config.json", _attn_implementation="someone/kernel:flash"), "attention from the hub"),
    (nested("text_config", attn_implementation="someone/kernel"), "attention from the hub"),
    (edit("config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}), "quantization"),
    (nested("vision_config", num_hidden_layers=10**7), "num_hidden_layers"),
    (nested("text_config", hidden_size=10**9), "describes another network than the weights"),
    (lambda f: (f / "config.json").write_text("[]"), "must be a JSON object"),
    (lambda f: (f / "config.json").write_text("{" * 10_000), "not valid JSON"),
], ids=["auto_map", "kernel", "kernel-internal", "kernel-of-a-part", "quantised", "layers", "width", "list", "deep"])
def test_a_config_that_asks_for_more(clip, damage, words, monkeypatch):
    """Refused before a network is built."""
    damage(clip)
    monkeypatch.setattr(transformers.CLIPModel, "from_pretrained", lambda *_, **__: pytest.fail("it was built"))
    with pytest.raises(UserError, match=words):
        load_clip(clip, "cpu")


def test_the_attention_is_ours_to_choose(clip):
    """Many a config.json says flash_attention_2; without the package, transformers would fetch a kernel."""
    edit("config.json", attn_implementation="flash_attention_2")(clip)
    nested("vision_config", _attn_implementation="flash_attention_2")(clip)
    loaded = load_clip(clip, "cpu").clip
    assert {m.config._attn_implementation for m in (loaded, loaded.text_model, loaded.vision_model)} == {"sdpa"}


@pytest.mark.parametrize("damage", [
    lambda f: (f / "tokenizer_config.json").unlink(), edit("tokenizer_config.json", model_max_length=10**30)],
    ids=["no-config", "no-length"])
def test_a_tokenizer_without_a_length(clip, damage):
    """The network knows how many tokens it takes; also where a text is longer."""
    damage(clip)
    texts = [*TEXTS, "a small red circle " * 20]
    with torch.no_grad():
        got, want = (load_clip(folder, "cpu").embed_text(texts) for folder in (clip, ASSETS / "clip"))
    assert torch.equal(got, want)


OPENAI = {"crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 224,
          "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": [0.48145466, 0.4578275, 0.40821073],
          "image_std": [0.26862954, 0.26130258, 0.27577711]}
SQUARE = {"size": {"height": 96, "width": 96}, "crop_size": 96, "do_center_crop": False}


@pytest.mark.parametrize("changes, side", [
    ({}, 224), ({"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}, 224),
    (SQUARE, 96), (SQUARE | {"resample": 2}, 96),
    ({"do_normalize": False}, 224), ({"do_rescale": False, "image_mean": [120.0] * 3, "image_std": [70.0] * 3}, 224),
    ({"do_rescale": True, "rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}, 224),
    ({"do_resize": False, "crop_size": 300}, 300),
], ids=["openai", "resize-more", "square", "bilinear", "no-mean", "no-rescale", "rescale", "no-resize"])
def test_preprocessing_equals_transformers(tmp_path, changes, side):
    """On a photograph, against the image processor that uses Pillow. Pillow rounds and cuts to 8 bits twice as it
    resizes, so the bounds are 8 of 255 levels at most and half a level on average, in the units of the result."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(OPENAI | changes))
    theirs = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor).from_pretrained(tmp_path)
    photo = Image.open(PHOTO).convert("RGB")
    want = np.asarray(theirs(images=photo, return_tensors="np").pixel_values[0], np.float64)
    image = torch.from_numpy(np.asarray(photo).copy()).permute(2, 0, 1)[None] / 255
    got = read_preprocessing(tmp_path, side, "--clip")(image)[0].double().numpy()
    level = changes.get("rescale_factor", 1 / 255) if changes.get("do_rescale", True) else 1.0
    level /= 1.0 if "do_normalize" in changes else min((OPENAI | changes)["image_std"])
    off = np.abs(got - want) / level
    assert got.shape == want.shape == (3, side, side)
    assert off.max() < 8 and off.mean() < 0.5, (off.max(), off.mean())


@pytest.mark.parametrize("values, words", [
    ({"do_pad": True}, "do_pad is not supported"), ({"resample": 1}, "resample 1 is not supported"),
    ({"crop_size": 32}, "makes images of 32 pixels, the network takes 64 x 64"),
    ({"do_center_crop": False, "size": {"height": 64, "width": 32}}, "the network takes 64 x 64"),
    ({"size": {"longest_edge": 64}}, "size"), ({"size": {"shortest_edge": 10**9}}, "whole number of pixels"),
    ({"crop_size": {"height": 64, "width": 32}}, "is not square"), ({"size": "big"}, "cannot be used"),
    ({"size": {"shortest_edge": 50}}, "crop_size 64 is larger"), ({"image_mean": [0.5, float("nan"), 0.5]}, "finite"),
    ({"image_std": [0, 0.5, 0.5]}, "above 0"),
    ({"image_std": [0.5] * 4}, "three"), ({"image_processor_type": "ViTImageProcessor"}, "is not CLIP's image proc"),
    (None, "is missing"), ([], "cannot be used")], ids=str)
def test_preprocessing_that_is_not_honoured(tmp_path, values, words):
    if values is not None:
        text = OPENAI | {"size": 64, "crop_size": 64} | values if isinstance(values, dict) else values
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(text))
    with pytest.raises(UserError) as caught:
        read_preprocessing(tmp_path, 64, "--clip X")
    assert str(caught.value).startswith(f"--clip X: {tmp_path}/preprocessor_config.json") and words in str(caught.value)


def test_preprocessing_that_does_not_fit_the_images(tmp_path):
    settings = OPENAI | {"do_resize": False, "do_center_crop": False}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    preprocess = read_preprocessing(tmp_path, 64, "--clip X")
    assert preprocess(torch.zeros(1, 3, 64, 64)).shape == (1, 3, 64, 64)
    with pytest.raises(UserError, match="become 32 x 64, the network takes 64 x 64"):
        preprocess(torch.zeros(1, 3, 64, 32))


def test_features_that_are_not_finite(clip):
    """Every weight is finite, and what comes of them is not."""
    weights(lambda t: t.update({"visual_projection.weight": torch.full((128, 128), 3e38)}))(clip)
    with pytest.raises(UserError, match="features that are not finite"):
        FeatureExtractors(clip=load_clip(clip, "cpu")).rows(torch.rand(2, 3, 64, 64), TEXTS)


@pytest.mark.parametrize("part, kind", [("text_projection", "texts"), ("visual_projection", "images")])
def test_a_projection_without_weights(clip, part, kind):
    """All scores would be 0."""
    weights(lambda t: t[f"{part}.weight"].zero_())(clip)
    with pytest.raises(UserError, match=f"gives embeddings of {kind} that are all 0"):
        FeatureExtractors(clip=load_clip(clip, "cpu")).rows(torch.rand(2, 3, 64, 64), TEXTS)


@pytest.mark.parametrize("change, words", [
    (lambda t: t["features.0.weight"].fill_(float("nan")), "features.0.weight has values that are not finite"),
    (lambda t: t.pop("features.0.weight"), "is no checker"), (lambda t: t.update(extra=torch.ones(1)), "is no checker"),
    (lambda t: t.update({"heads.count.weight": torch.ones(5, 192)}), "is no checker")],
    ids=["nan", "less", "more", "shape"])
def test_checker(tmp_path, change, words):
    folder = shutil.copytree(ASSETS / "checker", tmp_path / "checker")
    weights(change)(folder)
    with pytest.raises(UserError, match=words):
        load_checker(folder)


def test_inception(tmp_path, monkeypatch):
    """All of its weights have to be there, and finite; what is wrong is named."""
    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", lambda tensor, *_, **__: tensor)      # (seconds, unused)
    state = torch.load(write_inception(tmp_path / "good.pth"), weights_only=True)
    state = {key: torch.zeros_like(value) for key, value in state.items()}       # (they were never initialised)
    name = "Mixed_7c.branch_pool.conv.weight"
    for words, change in (
            (f"{name} has values that are not finite", {name: torch.full_like(state[name], float("nan"))}),
            (f"Missing key(s) in state_dict: \"{name}\"", {name: None, "extra": torch.ones(1)})):
        changed = {key: value for key, value in (state | change).items() if value is not None}
        torch.save(changed, tmp_path / "bad.pth")
        with pytest.raises(UserError) as caught:
            load_features(f"inception:{tmp_path / 'bad.pth'}", "cpu")
        assert words in str(caught.value) and "bad.pth" in str(caught.value)


def test_the_command_says_which_option(clip, tmp_path, capsys):
    """One line, exit code 2, no result; also of a network in `--features`."""
    (tmp_path / "images").mkdir()
    for n in range(2):
        Image.fromarray(np.full((64, 64, 3), 40 * n, np.uint8)).save(tmp_path / "images" / f"{n}.png")
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    without("text_projection.")(clip)
    for options, words in ((["--metrics", "clip", "--clip", clip], f"--clip {clip}: {clip} lacks"), (
            ["--metrics", "kid", "--features", f"clip:{clip}", "--reference", tmp_path / "images"],
            f"--features clip:{clip}: {clip} lacks")):
        line = fails(capsys, cli.main, "evaluate", "--model", tmp_path / "images", "--prompts",
                     tmp_path / "prompts.txt", "--out", tmp_path / "r.json", *options)
        assert words in line and not (tmp_path / "r.json").exists()


# ---- of the hub


def test_clip_of_the_hub(clip, tmp_path, monkeypatch):
    """Its safetensors and tokenizer alone are downloaded; a result names the id and the commit."""
    (clip / "onnx").mkdir()
    for name in ("pytorch_model.bin", "model.py", "onnx/config.json", "onnx/model.safetensors",
                 "model.fp16.safetensors"):
        (clip / name).write_bytes(b"{}")
    hub = Hub(clip, tmp_path / "0123abc")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    (tmp_path / "images").mkdir()
    for n in range(2):
        Image.new("RGB", (64, 64), (90 * n, 0, 0)).save(tmp_path / "images" / f"{n}.png")
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    results = []
    for name in ("someone/clip", ASSETS / "clip"):
        assert cli.main(["evaluate", "--model", str(tmp_path / "images"), "--prompts", str(tmp_path / "prompts.txt"),
                         "--metrics", "clip", "--clip", str(name), "--out", str(tmp_path / "r.json")]) == 0
        results.append(json.loads((tmp_path / "r.json").read_text()))
    ours, plain = results
    assert ours["metrics"] == plain["metrics"] and ours["clip"]["sha256"] == plain["clip"]["sha256"]
    assert (ours["clip"]["weights"], ours["clip"]["revision"]) == ("someone/clip", "0123abc")
    assert "revision" not in plain["clip"]
    assert sorted(p.name for p in hub.cache.rglob("*")) == sorted(p.name for p in (ASSETS / "clip").iterdir())
    assert load_features("clip:someone/clip", "cpu").path == "someone/clip"


def test_hub_that_does_not_give_it(clip, tmp_path, monkeypatch):
    """A line that says why; a path is never looked up, and a model without safetensors is refused."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    for name in (tmp_path / "gone", "./gone/clip", "gone.safetensors"):
        with pytest.raises(UserError, match="no CLIP in"):
            load_clip(name, "cpu")
    with pytest.raises(UserError, match=r"^--features clip:someone/clip: someone/clip is not a folder here, and the "):
        load_features("clip:someone/clip", "cpu")
    (clip / "model.safetensors").rename(clip / "pytorch_model.bin")
    monkeypatch.setattr("huggingface_hub.snapshot_download", Hub(clip, tmp_path / "0123abc"))
    with pytest.raises(UserError, match=r"^--clip someone/clip: .* has no weights"):
        load_clip("someone/clip", "cpu")
