"""Exports in plain diffusers, in a process that has not got this package: images, copies of `save_pretrained` and
`push_to_hub`, and what a caller gets wrong."""

import json
import os
import subprocess
import sys

import pytest
import torch
from tiny import write_tiny_teacher

from sidfast.publishing.export import write_export
from sidfast.publishing.load import load_pipeline
from sidfast.teachers.load import load_teacher

T_INIT = 500
PROMPTS = ["a small red circle", "a blue square", ""]
KINDS = ("epsilon", "v_prediction")
SCRIPT = """
import json, shutil, sys, types
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
def plain_diffusers(tmp_path_factory):
    """(the folder of exports of both kinds of prediction, the images of the process, the errors that it met)."""
    folder = tmp_path_factory.mktemp("exports")
    for kind in KINDS:
        teacher = load_teacher(str(write_tiny_teacher(folder / "teacher" / kind, kind)))
        (folder / kind).mkdir()
        write_export(teacher.one_step_pipeline(teacher.network, T_INIT), folder / kind / "export", torch.float32)
    done = subprocess.run([sys.executable, "-c", SCRIPT, folder, " ".join(KINDS), json.dumps(PROMPTS)], cwd=folder,
                          env=os.environ | {"HF_MODULES_CACHE": str(folder / "modules")},
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, torch.load(folder / "images.pt", weights_only=True), json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", KINDS)
def test_copies_make_the_same_images(plain_diffusers, kind):
    folder, made, _ = plain_diffusers
    pipe, one_step = load_pipeline(folder / kind / "export", "cpu")
    noise = [torch.Generator().manual_seed(i) for i in range(6)]
    want = pipe([text for text in PROMPTS for _ in range(2)], generator=noise, output_type="pt").images
    assert one_step and want.std() > 0.01
    for name in ("export", "saved", "pushed", "again"):
        torch.testing.assert_close(made[f"{kind}/{name}"], want, rtol=0, atol=1e-5)  # (threads may differ)


@pytest.mark.parametrize("copy", ["saved", "pushed"])
def test_copies_are_exports(plain_diffusers, copy):
    """This package knows them as such, and they hold the code that the export holds."""
    folder = plain_diffusers[0] / "epsilon"
    assert load_pipeline(folder / copy, "cpu")[1]
    assert (folder / copy / "pipeline.py").read_bytes() == (folder / "export" / "pipeline.py").read_bytes()


def test_errors_are_clear(plain_diffusers):
    for name, words in (("prompts", "prompt: must be a string or a list of one or more strings, not []"),
                        ("generators", "generator: 2 generators for 3 images"),
                        ("steps", "num_inference_steps: 4 is not possible"),
                        ("guidance", "guidance_scale: 7.5 is not possible")):
        assert words in plain_diffusers[2][name]
