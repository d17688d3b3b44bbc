"""Where a teacher's files are: variants, shards, revisions, paths that are not hub ids."""

import fnmatch
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers_input import edit, fails
from safetensors.torch import load_file, save_file

from sidfast import cli, train
from sidfast.common.errors import UserError
from sidfast.config.schema import load_config
from sidfast.runs.identity import describe_distillation
from sidfast.teachers.fingerprint import fingerprint
from sidfast.teachers.folders import find_teacher
from sidfast.teachers.load import load_meta_teacher, load_teacher

STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.fixture
def folder(tiny_teacher, tmp_path):
    return shutil.copytree(tiny_teacher, tmp_path / "teacher")


def as_variant(folder, variant, parts=STEMS, scale=1.0, keep=False):
    """Give parts' weights as a variant, in fp16, times a number."""
    for part in parts:
        path = folder / part / f"{STEMS[part]}.safetensors"
        tensors = {k: (scale * v).half() if v.is_floating_point() else v for k, v in load_file(path).items()}
        save_file(tensors, path.with_name(f"{STEMS[part]}.{variant}.safetensors"), {"format": "pt"})
        if not keep:
            path.unlink()


def weights(teacher):
    return {name: value for part in STEMS for name, value in teacher.parts[part].state_dict().items()}


def in_half(state):
    return {name: v.half().to(v.dtype) for name, v in state.items()}


def assert_equal(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_variant_alone(folder, tiny_teacher):
    as_variant(folder, "fp16")
    assert_equal(weights(load_teacher(folder)), in_half(weights(load_teacher(tiny_teacher))))
    assert load_meta_teacher(str(folder)).parameters() == load_meta_teacher(str(tiny_teacher)).parameters()


def test_a_variant_of_some_parts(folder, tiny_teacher):
    """Plain weights come first; the variant that is asked for is taken where a part has it, as diffusers does."""
    as_variant(folder, "ema", ["unet"], scale=0.5, keep=True)
    assert_equal(weights(load_teacher(folder)), weights(load_teacher(tiny_teacher)))
    changed = load_teacher(folder, variant="ema")
    plain = load_teacher(folder)
    assert_equal(changed.network.state_dict(), in_half({n: 0.5 * v for n, v in plain.network.state_dict().items()}))
    assert_equal(changed.parts["vae"].state_dict(), plain.parts["vae"].state_dict())
    assert fingerprint(changed) != fingerprint(plain)


def test_variants_that_must_be_chosen(folder):
    as_variant(folder, "bf16", ["unet"], keep=True)
    as_variant(folder, "fp16", ["unet"])
    with pytest.raises(UserError, match=r"model.variant: .* has no weights of the variant 'ema'"):
        load_teacher(folder, variant="ema")
    with pytest.raises(UserError, match=r"only as variants \(bf16, fp16\); choose one with model.variant"):
        load_teacher(folder)
    load_teacher(folder, variant="bf16")


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards(folder, tiny_teacher, variant):
    pipe = StableDiffusionPipeline.from_pretrained(tiny_teacher, safety_checker=None).to(dtype=torch.float16)
    for part in STEMS:
        for path in (folder / part).glob("*.safetensors"):
            path.unlink()
        getattr(pipe, part).save_pretrained(folder / part, max_shard_size="2KB", variant=variant)
        assert len([*(folder / part).glob("*-of-*.safetensors")]) > 1
    assert_equal(weights(load_teacher(folder)), in_half(weights(load_teacher(tiny_teacher))))


@pytest.mark.parametrize("name", ["../unet/diffusion_pytorch_model.safetensors", "/etc/passwd", 5], ids=str)
def test_shards_from_elsewhere(folder, name):
    [path] = (folder / "unet").glob("*.safetensors")
    path.rename(folder / "unet" / "other.safetensors")
    (folder / "unet" / f"{path.name}.index.json").write_text(json.dumps({"weight_map": {"conv_in.weight": name}}))
    with pytest.raises(UserError, match="is not a safetensors file of that folder"):
        load_teacher(folder)


@pytest.mark.parametrize("name, words", [
    ("./sd/model", "the folder ./sd/model does not exist"), ("/no/model", "the folder /no/model does not exist"),
    ("~/sd", "write the whole path"), ("models/sd/1.5", "does not exist"), ("here/gone", "the folder here/gone"),
    ("sd/v1.safetensors", "the file sd/v1.safetensors does not exist"), ("old/v1.ckpt", "the file old/v1.ckpt"),
    ("here/sd15.safetensors", "StableDiffusionPipeline.from_single_file('here/sd15.safetensors').save_pretrained(NEW)"),
    ("here/sd15.ckpt", "may be a pickle"), ("sd-15", "neither a folder nor a hub id"),
], ids=lambda value: value.replace("/", "_") if len(value) < 20 else "")
def test_a_path_is_never_a_hub_id(capsys, monkeypatch, write_config, tmp_path, name, words):
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)               # nothing is looked up
    (tmp_path / "here").mkdir()
    for file in ("sd15.safetensors", "sd15.ckpt"):
        (tmp_path / "here" / file).write_bytes(b"x")
    config = write_config(**{"model.teacher": name})
    monkeypatch.chdir(tmp_path)
    for command in ((train.main, "--config", config, "--out", "run"), (cli.main, "plan", "--config", config),
                    (cli.main, "sample", "--model", name, "--prompt", "x", "--out", "x.png")):
        line = fails(capsys, *command)
        assert words in line and "the hub did not" not in line
    assert not (tmp_path / "run").exists()


class Hub:
    """A model of the hub, for huggingface_hub.snapshot_download: copies what its patterns select."""

    def __init__(self, model, cache):
        self.model, self.cache, self.revisions = model, cache, set()

    def __call__(self, name, revision=None, allow_patterns=None, ignore_patterns=(), local_files_only=False,
                 dry_run=False):
        self.revisions.add(revision)
        files = []
        for path in (p for p in self.model.rglob("*") if p.is_file() and not local_files_only):
            part = str(path.relative_to(self.model))
            if any(fnmatch.fnmatch(part, p) for p in allow_patterns) and not any(
                    fnmatch.fnmatch(part, p) for p in ignore_patterns):
                files.append(SimpleNamespace(file_size=10**9, will_download=not (self.cache / part).exists()))
                if not dry_run:
                    (self.cache / part).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, self.cache / part)
        return files if dry_run else str(self.cache)

    def weights(self):
        return sorted(str(p.relative_to(self.cache)) for p in self.cache.rglob("*.safetensors"))


@pytest.mark.parametrize("change, options, brought", [
    (lambda f: as_variant(f, "fp16", keep=True), {}, [f"{p}/{STEMS[p]}.safetensors" for p in sorted(STEMS)]),
    (lambda f: as_variant(f, "fp16"), {}, [f"{p}/{STEMS[p]}.fp16.safetensors" for p in sorted(STEMS)]),
    (lambda f: as_variant(f, "ema", ["unet"], keep=True), {"variant": "ema", "revision": "v2"},
     ["text_encoder/model.safetensors", "unet/diffusion_pytorch_model.ema.safetensors",
      "vae/diffusion_pytorch_model.safetensors"]),
], ids=["plain", "fp16-alone", "variant"])
def test_what_is_downloaded(monkeypatch, capsys, folder, tmp_path, change, options, brought):
    change(folder)
    (folder / "unet" / "pipeline.py").write_text("")
    (folder / "vae" / "diffusion_pytorch_model.bin").write_text("")
    hub = Hub(folder, tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    assert find_teacher("someone/sd", **options) == hub.cache and hub.weights() == brought
    assert hub.revisions == {options.get("revision")} and not [*hub.cache.rglob("*.py"), *hub.cache.rglob("*.bin")]
    told = [line for line in capsys.readouterr().err.splitlines() if "downloading" in line]
    assert sum(float(line.split()[-2]) for line in told) == 3 and all("of someone/sd, " in line for line in told)
    load_teacher("someone/sd", **options)
    assert "downloading" not in capsys.readouterr().err
    load_meta_teacher("someone/sd")


def test_layers_that_are_not_used(folder, tiny_teacher):
    """Clip skip: fewer layers in config.json than in the weights."""
    encoder = load_teacher(tiny_teacher).parts["text_encoder"]
    encoder.config.num_hidden_layers = 3
    type(encoder)(encoder.config).save_pretrained(folder / "text_encoder")
    edit("text_encoder/config.json", num_hidden_layers=2)(folder)
    ours = load_teacher(folder).parts["text_encoder"]
    plain = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).text_encoder
    ids = torch.arange(24)[None]
    assert torch.equal(ours(ids)[0], plain(ids)[0]) and ours.config.num_hidden_layers == 2
    [path] = (folder / "text_encoder").glob("*.safetensors")
    tensors = load_file(path)
    save_file(tensors | {"encoder.layers.0.more.weight": torch.zeros(1)}, path, {"format": "pt"})
    with pytest.raises(UserError, match="does not know, 1 of"):
        load_teacher(folder)
    save_file(tensors, path, {"format": "pt"})
    edit("text_encoder/config.json", num_hidden_layers=4)(folder)
    with pytest.raises(UserError, match="lacks 16 of the network's tensors"):
        load_teacher(folder)


def test_an_export_names_its_teacher_by_the_whole_path(write_config, tmp_path, monkeypatch):
    (tmp_path / "teacher").mkdir()
    monkeypatch.chdir(tmp_path)
    for name, kept in (("teacher", str(tmp_path / "teacher")), ("owner/model", "owner/model")):
        assert describe_distillation(load_config(write_config(), [f"model.teacher={name}"]), 1)["teacher"] == kept


def test_results_of_older_runs_stay_comparable(write_config):
    """The hash of a run's settings does not see the keys that older runs do not have, unless they are set."""
    config = load_config(write_config())
    values = config.model_dump()
    values["model"] = {key: values["model"][key] for key in ("teacher", "resolution")}
    older = SimpleNamespace(model=config.model, model_dump=lambda: values)
    now = describe_distillation(config, 1)
    assert now["settings"] == describe_distillation(older, 1)["settings"]
    for setting in ("model.variant=fp16", "model.prediction_type=epsilon", "model.revision=main"):
        changed = describe_distillation(load_config(write_config(), [setting]), 1)
        assert changed["settings"] != now["settings"]
