"""Exports of both kinds in plain diffusers, in a process that has not got this package: images, copies that
`save_pretrained` and `push_to_hub` make, the recipe of the card, and what a caller gets wrong."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from helpers_checkpoint import write_checkpoint
from helpers_input import fails
from tiny import write_tiny_teacher

from sidfast import cli
from sidfast.config.schema import build_config
from sidfast.publishing.load import load_pipeline, loading_notes
from sidfast.teachers.load import load_teacher

T_INIT = 500
PROMPTS = ["a small red circle", "a blue square", ""]
KINDS = ("epsilon", "v_prediction")
SCRIPT = """
import json, re, shutil, sys, types
sys.modules["sidfast"] = None
import diffusers, huggingface_hub, torch
from diffusers.utils import hub_utils
folder, kinds, prompts = sys.argv[1], sys.argv[2].split(), json.loads(sys.argv[3])
made, said, card = {}, {}, huggingface_hub.ModelCard("---\\n{}\\n---\\n")

def load(place):
    return diffusers.DiffusionPipeline.from_pretrained(f"{folder}/{place}", trust_remote_code=True,
                                                       low_cpu_mem_usage=False)

def images(pipe):
    noise = [torch.Generator().manual_seed(i) for i in range(6)]
    return pipe(prompts, num_images_per_prompt=2, generator=noise, output_type="pt", num_inference_steps=1,
                guidance_scale=0.0, negative_prompt=None, callback_on_step_end=lambda *args: args[-1]).images

def load_plain(place):
    return diffusers.StableDiffusionPipeline.from_pretrained(f"{folder}/{place}", low_cpu_mem_usage=False)

def plain_images(pipe, scale):
    noise = torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(6)])
    return pipe(prompts, num_images_per_prompt=2, output_type="pt", timesteps=[500], guidance_scale=0,
                latents=scale * noise).images

for kind in kinds:
    pipe = load(f"{kind}/export")
    made[f"{kind}/export"] = images(pipe)
    pipe.save_pretrained(f"{folder}/{kind}/saved")
    hub_utils.create_repo = lambda *args, **options: types.SimpleNamespace(repo_id="me/mine")
    hub_utils.load_or_create_model_card = hub_utils.populate_model_card = lambda *args, **options: card
    pipe._upload_folder = lambda place, *args, **options: shutil.copytree(place, f"{folder}/{kind}/pushed")
    pipe.push_to_hub("me/mine")
    for copy in ("saved", "pushed"):
        made[f"{kind}/{copy}"] = images(load(f"{kind}/{copy}"))
    again = load(f"{kind}/saved")
    again.save_pretrained(f"{folder}/{kind}/saved")
    made[f"{kind}/again"] = images(load(f"{kind}/saved"))

    code, other = re.findall("```python\\n(.*?)```", open(f"{folder}/{kind}/plain/README.md").read(), re.DOTALL)
    scale = float(re.search("noise = (\\\\S+) ", code)[1])
    plain = load_plain(f"{kind}/plain")
    made[f"{kind}/plain"] = plain_images(plain, scale)
    plain.save_pretrained(f"{folder}/{kind}/plain-saved")
    made[f"{kind}/plain-saved"] = plain_images(load_plain(f"{kind}/plain-saved"), scale)
    torch.manual_seed(0)
    exec(code.replace("THIS FOLDER", f"{folder}/{kind}/plain"))
    made[f"{kind}/recipe"] = diffusers.image_processor.VaeImageProcessor.numpy_to_pt(
        diffusers.image_processor.VaeImageProcessor.pil_to_numpy(image))
    exec(other.replace("pipe.", "plain."))
    noise = [torch.Generator().manual_seed(i) for i in range(6)]
    made[f"{kind}/euler"] = plain(prompts, num_images_per_prompt=2, generator=noise, output_type="pt",
                                  timesteps=[500], guidance_scale=0).images
    pipe = load(f"{kind}/export")

for name, call in {
        "prompts": lambda: pipe([]), "generators": lambda: pipe(prompts, generator=[torch.Generator()] * 2),
        "steps": lambda: pipe("x", num_inference_steps=4), "guidance": lambda: pipe("x", guidance_scale=7.5)}.items():
    try:
        call()
    except ValueError as error:
        said[name] = str(error)
torch.save(made, f"{folder}/images.pt")
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def exports(tmp_path_factory, tiny_config):
    """A folder with exports of both kinds, of a run of each kind of prediction; fp32."""
    folder = tmp_path_factory.mktemp("exports")
    for kind in KINDS:
        place, run = folder / "teacher" / kind, folder / kind / "run"
        weights = load_teacher(str(write_tiny_teacher(place, kind))).network.state_dict()
        run.mkdir(parents=True)
        values = tiny_config | {"model": {"teacher": str(place)}, "noise": {"t_init": T_INIT}}
        (run / "config.json").write_text(json.dumps({"config": build_config(values, "test").model_dump()}))
        write_checkpoint(run / "checkpoints", 3, {name: value + 0.01 for name, value in weights.items()})
        for name, more in (("export", ()), ("plain", ["--plain"])):
            assert cli.main(["export", "--run", str(run), "--out", str(folder / kind / name), "--dtype", "fp32",
                             *more]) == 0
    return folder


@pytest.fixture(scope="module")
def plain_diffusers(exports):
    """(The images of the process, the errors that it met.)"""
    done = subprocess.run([sys.executable, "-c", SCRIPT, exports, " ".join(KINDS), json.dumps(PROMPTS)], cwd=exports,
                          env=os.environ | {"HF_MODULES_CACHE": str(exports / "modules")},
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(exports / "images.pt", weights_only=True), json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module", params=KINDS)
def kind(request, exports):
    """(Kind of prediction, the pipeline of the trainer, its images of PROMPTS, twice each.)"""
    pipe, one_step = load_pipeline(exports / request.param / "export", "cpu")
    noise = [torch.Generator().manual_seed(i) for i in range(6)]
    want = pipe([text for text in PROMPTS for _ in range(2)], generator=noise, output_type="pt").images
    assert one_step and want.std() > 0.01
    return request.param, pipe, want


def test_copies_make_the_same_images(plain_diffusers, kind):
    for name in ("export", "saved", "pushed", "again"):
        torch.testing.assert_close(plain_diffusers[0][f"{kind[0]}/{name}"], kind[2], rtol=0, atol=1e-5)      # (threads)


def test_plain_export_makes_the_same_images(plain_diffusers, kind):
    """In a stock pipeline, without trust_remote_code; also a copy of it."""
    made = plain_diffusers[0]
    for name, bound in (("plain", 1e-6), ("plain-saved", 1e-6), ("euler", 2e-5)):
        assert (made[f"{kind[0]}/{name}"] - kind[2]).abs().max() <= bound, name


def test_recipe_of_the_card(plain_diffusers, kind):
    name, pipe, _ = kind
    torch.manual_seed(0)
    want = pipe("a prompt", latents=torch.randn(1, 4, 8, 8), output_type="pt").images
    assert (plain_diffusers[0][f"{name}/recipe"] - want).abs().max() <= 0.5 / 255 + 1e-6         # (of PIL images)


def test_folder_of_a_plain_export(exports, capsys):
    """A stock index without code; this package takes it for the one-step generator that it is, and replaces it."""
    folder = exports / "epsilon" / "plain"
    assert not list(folder.rglob("*.py"))
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline" and index["scheduler"] == ["diffusers", "DDPMScheduler"]
    assert index["safety_checker"] == [None, None] and index["requires_safety_checker"] is False
    pipe, one_step = load_pipeline(folder, "cpu")
    assert one_step and pipe.config.t_init == T_INIT and loading_notes(folder) == {}
    capsys.readouterr()
    run = exports / "epsilon" / "run"
    again = ["export", "--run", str(run), "--out", str(folder), "--dtype", "fp32", "--plain"]
    assert cli.main(again) == 0
    assert "the generator after 3 updates; README.md says how to call it" in capsys.readouterr().out
    text = (folder / "README.md").read_text()
    assert "timesteps=[500], guidance_scale=0" in text and "trust_remote_code" not in text
    assert re.search(r"noise = 0\.\d+ \* torch\.randn\(1, 4, 8, 8\)", text)
    line = fails(capsys, cli.main, *again, "--single-file")
    assert "--single-file: not allowed with argument --plain" in line


def test_copies_are_exports(plain_diffusers, exports):
    """This package knows them as such, and they hold the code that the export holds."""
    folder = exports / "epsilon"
    for copy in ("saved", "pushed"):
        assert load_pipeline(folder / copy, "cpu")[1]
        assert (folder / copy / "pipeline.py").read_bytes() == (folder / "export" / "pipeline.py").read_bytes()


def test_errors_are_clear(plain_diffusers):
    for name, words in (("prompts", "prompt: must be a string or a list of one or more strings, not []"),
                        ("generators", "generator: 2 generators for 3 images"),
                        ("steps", "num_inference_steps: 4 is not possible"),
                        ("guidance", "guidance_scale: 7.5 is not possible")):
        assert words in plain_diffusers[1][name]
