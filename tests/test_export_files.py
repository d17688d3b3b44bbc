"""The folder of an export: what older libraries read, the image that its pipeline makes, and its model card."""

import json
import os
import re
import runpy
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from helpers_training import train_here
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import write_tiny_teacher
from transformers import CLIPTextModel, CLIPTokenizer

from sidfast.common.errors import UserError
from sidfast.common.files import drop_lock, take_lock
from sidfast.config.schema import load_config
from sidfast.evaluation.metrics import title
from sidfast.publishing import card
from sidfast.publishing.export import recover_export, save_tokenizer, write_export
from sidfast.publishing.grid import image_grid, save_grid
from sidfast.publishing.load import load_pipeline
from sidfast.teachers import sd_pipeline
from sidfast.teachers.load import load_teacher

OLD = os.environ.get("SIDFAST_OLD_LIBRARIES")            # folders of `pip install --target`, with colons between them
PROMPTS = ["a small red circle", "A RED-ish  café's 42 cats; it's über", ""]
T_INIT = 500


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def export(request, tmp_path_factory):
    """An export in fp32 of a teacher whose VAE has another scaling factor, from another timestep than the usual one."""
    folder = tmp_path_factory.mktemp("export")
    write_tiny_teacher(folder / "teacher", request.param)
    file = folder / "teacher" / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scaling_factor": 0.5}))
    teacher = load_teacher(str(folder / "teacher"))
    write_export(teacher.one_step_pipeline(teacher.network, T_INIT), folder / "export", torch.float32)
    return folder / "export"


@pytest.fixture(scope="module")
def pipe(export):
    return load_pipeline(export, "cpu")[0]


def test_files_of_both_libraries(export, pipe):
    """The names that transformers 4 and 5 look for, and the same tokens from vocab.json and merges.txt alone."""
    with safe_open(export / "text_encoder" / "model.safetensors", "pt") as f:
        names = set(f.keys())
    assert names == {f"text_model.{name}" for name in pipe.text_encoder.state_dict()}
    config = json.loads((export / "text_encoder" / "config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == "float32"
    folder = export / "tokenizer"
    assert {p.name for p in folder.iterdir()} >= {"vocab.json", "merges.txt", "special_tokens_map.json",
                                                  "tokenizer_config.json", "tokenizer.json"}
    merges = [tuple(line.split()) for line in (folder / "merges.txt").read_text().splitlines()[1:]]
    special = json.loads((folder / "special_tokens_map.json").read_text())
    again = CLIPTokenizer(json.loads((folder / "vocab.json").read_text()), merges, **special)
    assert again(PROMPTS).input_ids == pipe.tokenizer(PROMPTS).input_ids
    encoder, found = CLIPTextModel.from_pretrained(export / "text_encoder", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert torch.equal(encoder.state_dict()["final_layer_norm.weight"],
                       pipe.text_encoder.state_dict()["final_layer_norm.weight"])


@pytest.mark.skipif(not OLD, reason="SIDFAST_OLD_LIBRARIES names no folders")
@pytest.mark.parametrize("libraries", (OLD or "").split(":"))
def test_older_libraries(export, pipe, tmp_path, libraries):
    """In plain diffusers, of another version with its transformers, the same noise makes the same images."""
    script = f"""
import sys; sys.modules["sidfast"] = None
import torch, diffusers
from diffusers import DiffusionPipeline
assert diffusers.__file__.startswith({libraries!r}), diffusers.__file__
pipe = DiffusionPipeline.from_pretrained({str(export)!r}, trust_remote_code=True, low_cpu_mem_usage=False)
noise = [torch.Generator().manual_seed(i) for i in range(3)]
images = pipe({PROMPTS!r}, generator=noise, output_type="pt", num_inference_steps=1, guidance_scale=0).images
torch.save((pipe.encode_prompt({PROMPTS!r})[0], images), {str(tmp_path / 'images.pt')!r})
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=os.environ | {"PYTHONPATH": libraries}, check=True)
    text, images = torch.load(tmp_path / "images.pt", weights_only=True)
    noise = [torch.Generator().manual_seed(i) for i in range(3)]
    assert torch.allclose(text, pipe.encode_prompt(PROMPTS)[0], atol=1e-5)
    assert torch.allclose(images, pipe(PROMPTS, generator=noise, output_type="pt").images, atol=1e-5)


def test_older_diffusers_are_refused(monkeypatch):
    monkeypatch.setattr("diffusers.__version__", "0.27.2")
    with pytest.raises(ImportError, match=r"needs diffusers 0\.30 or newer, not 0\.27\.2"):
        runpy.run_path(sd_pipeline.__file__)


def test_image_by_the_equations(export, pipe):
    """Eqs. 2 and 4 of method.md, from the files alone."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    a2 = (1 - betas).cumprod(0)[T_INIT].item()
    a, s = a2**0.5, (1 - a2) ** 0.5
    kind = json.loads((export / "scheduler" / "scheduler_config.json").read_text())["prediction_type"]
    A, B = {"epsilon": (1 / a, -s / a), "v_prediction": (a, -s)}[kind]
    unet, vae, text = (cls.from_pretrained(export / part).eval() for cls, part in (
        (UNet2DConditionModel, "unet"), (AutoencoderKL, "vae"), (CLIPTextModel, "text_encoder")))
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    ids = torch.tensor(pipe.tokenizer(["a red circle", "x"], padding="max_length").input_ids)
    with torch.no_grad():
        o = unet(s * z, torch.tensor(T_INIT), encoder_hidden_states=text(ids).last_hidden_state).sample
        x = A * s * z + B * o
        want = (vae.decode(x / 0.5).sample / 2 + 0.5).clamp(0, 1)
    got = pipe(["a red circle", "x"], latents=z, output_type="pt").images
    assert want.std() > 0.01 and torch.allclose(got, want, atol=1e-5)
    assert torch.allclose(pipe(["a red circle", "x"], latents=z, output_type="latent").images, x, atol=1e-4)


def test_the_usual_arguments(pipe):
    def make(*args, **options):
        return pipe(*args, output_type="pt", generator=torch.Generator().manual_seed(5), **options).images

    want = make("a red circle")
    for options in ({"num_inference_steps": 1, "guidance_scale": 0}, {"guidance_scale": 1.0}, {"guidance_scale": None},
                    {"negative_prompt": ""}, {"negative_prompt": [""]}, {"height": 16, "width": 16}):
        assert torch.equal(make("a red circle", **options), want), options
    embeds = pipe.encode_prompt(["a red circle"])[0]
    assert torch.equal(make(prompt_embeds=embeds), want)
    several = make(prompt_embeds=embeds, num_images_per_prompt=2)
    assert torch.allclose(several, make(["a red circle"] * 2), atol=1e-6) and len(several) == 2
    assert pipe("x", height=16, width=32).images[0].size == (32, 16)


def test_callback(pipe):
    seen = []

    def callback(owner, step, timestep, tensors):
        seen.append((owner, step, timestep, {name: value.shape for name, value in tensors.items()}))
        return {"latents": torch.zeros_like(tensors["latents"])}

    latents = pipe("x", callback_on_step_end=callback, output_type="latent",
                   callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"]).images
    assert seen == [(pipe, 0, T_INIT, {"latents": (1, 4, 8, 8), "prompt_embeds": (1, 24, 16)})]
    assert not latents.any()
    assert pipe("x", callback_on_step_end=lambda *_: None, output_type="latent").images.any()


@pytest.mark.parametrize("args, options, words", [
    (["x"], {"num_inference_steps": 4}, "num_inference_steps: 4 is not possible"),
    (["x"], {"guidance_scale": 7.5}, "guidance_scale: 7.5 is not possible"),
    (["x"], {"guidance_scale": float("nan")}, "guidance_scale: nan"), (["x"], {"guidance_scale": -1}, "guidance_scale"),
    (["x"], {"negative_prompt": "blurry"}, "negative_prompt: has no effect"),
    ([[]], {}, "prompt: must be a string or a list of one or more"), ([["a", 5]], {}, "prompt: must be a string"),
    ([], {}, "one of prompt and prompt_embeds"), (["x"], {"prompt_embeds": torch.zeros(1, 24, 16)}, "one of prompt"),
    ([], {"prompt_embeds": torch.zeros(1, 24, 32)}, r"prompt_embeds: shape \[1, 24, 32\]"),
    (["x"], {"num_images_per_prompt": 0}, "num_images_per_prompt must be at least 1"),
    ([["a", "b", "c"]], {"generator": [torch.Generator()] * 2}, "generator: 2 generators for 3 images"),
    (["x"], {"generator": []}, "generator: 0 generators for 1 images"),
    (["x"], {"latents": torch.zeros(2, 4, 8, 8)}, r"latents: shape \[2, 4, 8, 8\] where \[1, 4, 8, 8\] is needed"),
    (["x"], {"latents": torch.zeros(1, 4, 8, 8), "height": 32}, r"where \[1, 4, 16, 8\] is needed"),
    (["x"], {"height": 15}, "height and width must be multiples of 2: height is 15"),
    (["x"], {"width": 0}, "width is 0"),
    (["x"], {"callback_on_step_end_tensor_inputs": ["noise"]}, "noise")])
def test_arguments_without_effect(pipe, args, options, words):
    with pytest.raises(ValueError, match=words):
        pipe(*args, **options)


def test_two_processes_do_not_mix_their_files(pipe, tmp_path):
    """Neither writes into the folder of the other, nor takes it for what a killed process left."""
    lock, partial = take_lock(tmp_path / ".export.lock"), tmp_path / ".export.partial"
    partial.mkdir()
    with pytest.raises(BlockingIOError, match="another process is writing an export"):
        write_export(pipe, tmp_path / "export")
    recover_export(tmp_path / "export")
    assert partial.is_dir() and not (tmp_path / "export").exists()
    drop_lock(lock)
    recover_export(tmp_path / "export")
    assert not partial.exists()


def test_weights_that_fp16_cannot_hold(pipe, tmp_path):
    teacher = load_teacher(str(write_tiny_teacher(tmp_path / "teacher")))
    teacher.network.conv_in.bias[0] = 1e5
    large = teacher.one_step_pipeline(teacher.network, T_INIT)
    with pytest.raises(UserError, match=r"weights of the unet, as float16, are not finite \(conv_in\.bias\)"):
        write_export(large, tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]
    write_export(large, tmp_path / "export", torch.bfloat16)
    assert load_pipeline(tmp_path / "export", "cpu")[0].unet.conv_in.bias[0] == pytest.approx(1e5, rel=0.01)


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_run_whose_weights_fp16_cannot_hold(write_config, tmp_path, capsys, part):
    """Its exports are in bfloat16, and it says so once."""
    folder = write_tiny_teacher(tmp_path / "teacher")
    [path] = (folder / part).glob("*.safetensors")
    tensors = load_file(path)
    name = {"unet": "conv_in.bias", "vae": "encoder.conv_in.bias"}[part]
    tensors[name][0] = 1e5
    save_file(tensors, path, {"format": "pt"})
    config = write_config(**{"model.teacher": str(folder), "train.steps": 2, "train.save_every": 1})
    train_here(config, tmp_path / "run")
    assert capsys.readouterr().err.count("so the export is in bfloat16") == 1
    network = getattr(load_pipeline(tmp_path / "run" / "export", "cpu")[0], part)
    assert dict(network.named_parameters())[name][0] == pytest.approx(1e5, rel=0.01)


def test_tokenizer_files_do_not_depend_on_its_last_call(pipe, tmp_path):
    written = []
    for n, call in enumerate((lambda: None, lambda: pipe.tokenizer("x", padding="max_length", truncation=True))):
        call()
        save_tokenizer(pipe.tokenizer, tmp_path / str(n))
        written.append({path.name: path.read_bytes() for path in (tmp_path / str(n)).iterdir()})
    assert written[0] == written[1] and json.loads(written[0]["tokenizer.json"])["padding"] is None


# ---- the model card

HOSTILE = "a|b`c``d\n# e $x$ <img src=x> [l](u) *s*"


def written_card(folder, write_config, evaluations, step, **changes):
    """README.md of an export of a run, and the run."""
    run, path = folder / "run", write_config(**changes)
    (run / "samples").mkdir(parents=True)
    (run / "export").mkdir()
    for n in (0, 4, 8):
        save_grid(image_grid({f"after {n}": [Image.new("RGB", (8, 8), (n, 0, 0))]}, ["x"]),
                  run / "samples" / f"step-{n:08d}.png")
    (run / "config.json").write_text(json.dumps({"config": load_config(path).model_dump()}))
    (run / "evaluation.json").write_text(json.dumps(evaluations))
    (run / "export" / "distillation.json").write_text(json.dumps({"step": step}))
    card.write_card(run, run / "export", title)
    return (run / "export" / "README.md").read_text(), run


def test_card_escapes_what_others_wrote(write_config, tmp_path):
    teacher = tmp_path / HOSTILE.replace("/", "").replace("\n", " ")
    teacher.mkdir()
    (teacher / "README.md").write_text("---\nlicense: mit | `x` $y$ <b>\n---\n")
    text, _ = written_card(tmp_path, write_config, {HOSTILE: {"images": 9, "step": 4, HOSTILE: 1.5}}, 4,
                           **{"model.teacher": str(teacher), "data.prompts": HOSTILE})
    head, body = text.split("\n---\n", 1)
    assert "license" not in head
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3, 4}         # (of two tables: no cell was split)
    prompts, = (row for row in rows if row.startswith("| prompts "))
    assert prompts == r"| prompts | ```a\|b`c``d\n# e $x$ <img src=x> [l](u) *s*``` |"
    assert "| this generator | 9 | 1.5 |" in rows
    assert rows[0].endswith(r"| a\|b\`c\`\`d\\n\# e \$x\$ \<img src=x\> \[l\](u) \*s\* |")
    assert r"That of the teacher: ``mit \| `x` $y$ <b>``, as its folder states." in body


def test_card_is_of_its_own_model(write_config, tmp_path):
    """Numbers and samples of other steps of the run, before or after, are of another generator."""
    numbers = {"start": {"images": 9, "accuracy": 0.1, "step": 0}, "step 4": {"images": 9, "accuracy": 0.4, "step": 4},
               "end": {"images": 9, "accuracy": 0.8, "step": 8}, "old": {"images": 9, "accuracy": 0.3},
               "teacher": {"images": 9, "accuracy": 0.9, "step": None}}
    text, run = written_card(tmp_path, write_config, numbers, 4)
    assert numbers_of(text) == {"teacher": "0.9", "start": "0.1", "this generator": "0.4"}
    with Image.open(run / "export" / "grid.png") as grid, Image.open(run / "samples" / "step-00000004.png") as own:
        assert list(grid.getdata()) == list(own.getdata())
    assert card.OLDEST in text and card.OLDEST in " ".join(sd_pipeline.__doc__.split())
    for about in ({"step": 5}, {"step": None}, {}):      # (no grid, and no numbers, are of these)
        (run / "export" / "distillation.json").write_text(json.dumps(about))
        card.write_card(run, run / "export", title)
        text = (run / "export" / "README.md").read_text()
        assert numbers_of(text) == {"teacher": "0.9", "start": "0.1"}
        assert not (run / "export" / "grid.png").exists() and "grid.png" not in text


def test_card_of_the_best_has_its_own_record(write_config, tmp_path):
    """Numbers of another evaluation, as settings may ask later, do not stand beside it."""
    numbers = {"start": {"images": 9, "accuracy": 0.1, "step": 0, "protocol": "new"},
               "end": {"images": 9, "accuracy": 0.8, "step": 4, "protocol": "new"}}
    _, run = written_card(tmp_path, write_config, numbers, 4)
    for protocol, shown in (("new", {"start": "0.1", "this generator": "0.7"}), ("old", {"this generator": "0.7"})):
        best = {"images": 9, "accuracy": 0.7, "step": 4, "protocol": protocol}
        (run / "export" / "distillation.json").write_text(json.dumps({"step": 4, "evaluation": best}))
        card.write_card(run, run / "export", title)
        assert numbers_of((run / "export" / "README.md").read_text()) == shown


def numbers_of(text):
    """{row: accuracy} of a card's numbers."""
    return dict(re.findall(r"^\| ([\w ]+) \| 9 \| (\S+) \|$", text, re.MULTILINE))
