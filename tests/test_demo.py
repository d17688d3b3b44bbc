"""`sidfast demo` and `sidfast export`: a real gradio page in this process, and folders that diffusers loads."""

import json
import math
import os
import shutil
import socket

import pytest
import torch
from helpers_checkpoint import write_checkpoint
from PIL import Image

from sidfast import cli
from sidfast.common.errors import UserError
from sidfast.config.schema import build_config
from sidfast.publishing.export import read_distillation, write_export
from sidfast.publishing.load import load_pipeline
from sidfast.teachers import tokenizer
from sidfast.teachers.load import load_teacher

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def export(tiny_teacher, tmp_path_factory):
    """An export that names its teacher."""
    teacher, folder = load_teacher(str(tiny_teacher)), tmp_path_factory.mktemp("demo") / "export"
    write_export(teacher.one_step_pipeline(teacher.network, 625), folder, distillation={"teacher": str(tiny_teacher)})
    return folder


def test_page(export, tiny_teacher, capfd):
    """Through gradio's own server, on a port of this machine: student and teacher from the same noise, with times."""
    gradio = pytest.importorskip("gradio")
    from gradio_client import Client

    from sidfast.publishing.demo import build_demo, open_models

    student, teacher = open_models(export, None, CPU)
    assert student.one_step and teacher.name == str(tiny_teacher) and not teacher.one_step
    page = build_demo(student, teacher)
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False" and page.analytics_enabled is False
    _, url, share = page.queue().launch(server_name="127.0.0.1", quiet=True, prevent_thread_lock=True, ssr_mode=False)
    try:
        assert "127.0.0.1" in url and share is None
        client = Client(url, verbose=False)
        shown = {name: client.predict("a red circle", 3, 2, 1.5, api_name=f"/{name}")
                 for name in ("student", "teacher")}
        for name, words in (("student", "1 step"), ("teacher", "2 steps, guidance 1.5")):
            path, text = shown[name]
            assert text.endswith(words) and " s**" in text
            pipe, one_step = load_pipeline(export if name == "student" else tiny_teacher, "cpu")
            options = {} if one_step else {"num_inference_steps": 2, "guidance_scale": 1.5}
            want = pipe("a red circle", generator=torch.Generator().manual_seed(3), **options).images[0]
            assert list(Image.open(path).convert("RGB").getdata()) == list(want.getdata())
        assert client.predict(3, api_name="/next_seed") == 4
        assert set(client.view_api(return_format="dict")["named_endpoints"]) == {"/student", "/teacher", "/next_seed"}
        refused(url, capfd)
    finally:
        page.close()
        gradio.close_all()


GOOD = {"prompt": "a red circle", "seed": 3, "steps": 2, "guidance": 1.5}
SEED, STEPS, GUIDANCE = (f"The {name} must be a {kind}number from {least} to" for name, kind, least in (
    ("seed", "whole ", 0), ("steps", "whole ", 1), ("guidance", "", 0)))


def refused(url, capfd):
    """What a program can send and nobody can type: an answer in words, and no traceback."""
    import httpx  # (gradio brings it)

    def answer(name, *values):                           # (JSON as Python has it: with NaN, numbers of any size)
        api = f"{url}gradio_api/call/{name}"
        sent = httpx.post(api, content=json.dumps({"data": values}), headers={"Content-Type": "application/json"})
        return httpx.get(f"{api}/{sent.json()['event_id']}", timeout=60).text

    capfd.readouterr()
    for name, words, value in (
            ("prompt", "must be text", ["a", "b"]), ("prompt", "at most 10000 characters", "x" * 5_000_000),
            ("seed", SEED, 2**63), ("seed", SEED, "seven"), ("steps", STEPS, math.nan), ("steps", STEPS, None),
            ("guidance", GUIDANCE, math.inf)):
        assert words in answer("teacher", *(GOOD | {name: value}).values()), name
    assert SEED in answer("next_seed", 2**63 - 1)
    said = "".join(capfd.readouterr())
    assert "Traceback" not in said and "Error" not in said, said


@pytest.mark.parametrize("name, words, values", [
    ("prompt", "A prompt is needed", ["", "  "]), ("prompt", "must be text", [None, ["a"], {"a": 1}, 7]),
    ("prompt", "characters", ["x" * 10_001, "a \ud800 b"]),
    ("seed", SEED, [2**63, 10**400, -1, 1.5, "7", None, True, [3], math.nan, math.inf]),
    ("steps", STEPS, [0, 101, 2.5, "2", None, False, math.nan]),
    ("guidance", GUIDANCE, [-1, 10.5, 10**400, "1.5", None, True, math.nan])],
    ids=["empty", "no-text", "long", "seed", "steps", "guidance"])
def test_inputs(name, words, values):
    from sidfast.publishing.demo import check_inputs

    assert check_inputs(*(GOOD | {"seed": 3.0, "steps": 2.0}).values()) == tuple(GOOD.values())
    for value in values:
        with pytest.raises(UserError, match=words):
            check_inputs(*(GOOD | {name: value}).values())


@pytest.mark.parametrize("args, words", [
    (["--model", "/nowhere"], "/nowhere"), (["--model", "EXPORT", "--teacher", "/nowhere"], "/nowhere"),
    (["--model", "TEACHER", "--teacher", "TEACHER"], "takes several steps itself"),
    (["--model", "/nowhere", "--port", "99999999"], "--port must be at least 1 and at most 65535"),
    (["--model", "/nowhere", "--port", "-1"], "--port"),
    (["--model", "/nowhere", "--host", "203.0.113.7"], "--host 203.0.113.7: the page cannot be there (Cannot assign"),
    (["--model", "/nowhere", "--host", "x" * 70], "--host xxx")],
    ids=["model", "teacher", "several", "port", "negative-port", "host", "long-host"])
def test_bad_input(export, tiny_teacher, capsys, args, words):
    pytest.importorskip("gradio")
    places = {"EXPORT": str(export), "TEACHER": str(tiny_teacher)}
    assert cli.main(["demo", *(places.get(arg, arg) for arg in args)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("sidfast: ") and words in error and "\n" not in error


def test_prompts_and_guidance_suit_the_teacher(export, tiny_teacher, tmp_path):
    """Of the shapes world for those who know its words alone; the guidance that a student was distilled with."""
    from sidfast.publishing.demo import open_models

    teacher = load_teacher(str(tiny_teacher))
    write_export(teacher.one_step_pipeline(teacher.network, 625), tmp_path / "guided",
                 distillation={"guidance": {"kappa1": 1.5, "kappa4": 4.5}})
    assert open_models(tmp_path / "guided", None, CPU)[0].guidance == 4.5
    student, teacher = open_models(export, None, CPU)
    assert student.guidance == teacher.guidance == 1.5
    assert all(set(text.split()) <= set(tokenizer.words()) for text in student.prompts)
    other = shutil.copytree(export, tmp_path / "other")
    path = other / "tokenizer" / "tokenizer.json"        # (of another vocabulary)
    text = path.read_text().replace('"red</w>"', '"X"').replace('"blue</w>"', '"red</w>"')
    path.write_text(text.replace('"X"', '"blue</w>"'))
    student = open_models(other, tiny_teacher, CPU)[0]
    assert student.guidance == 7.5 and "lighthouse" in student.prompts[0]


@pytest.mark.parametrize("host, lines", [
    ("127.0.0.1", ["http://127.0.0.1:7 (", "ssh -N -L 7:127.0.0.1:7 me@box, "]),
    ("::1", ["http://[::1]:7 (", "ssh -N -L 7:[::1]:7 me@box, "]),
    ("0.0.0.0", ["http://box:7 (", "can use the page, without a password"]),
    ("10.0.0.5", ["http://10.0.0.5:7 (", "can use the page"])], ids=str)
def test_addresses(monkeypatch, host, lines):
    from sidfast.publishing import demo

    monkeypatch.setattr(demo.getpass, "getuser", lambda: "me")
    monkeypatch.setattr(demo.socket, "gethostname", lambda: "box")
    said = demo.address_text(host, 7).splitlines()
    assert all(line.startswith("sidfast: ") and words in line for line, words in zip(said, lines, strict=True))


def test_address_that_is_taken():
    from sidfast.publishing.demo import check_address

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"--port {port}: the page cannot be there \(Address already in use"):
            check_address("127.0.0.1", port)
    check_address("localhost", port)


@pytest.fixture(scope="module")
def run(tiny_teacher, tiny_config, tmp_path_factory):
    """A run directory with a checkpoint of two processes."""
    out = tmp_path_factory.mktemp("run") / "run"
    out.mkdir()
    config = build_config(tiny_config, "test")
    (out / "config.json").write_text(json.dumps({"config": config.model_dump()}))
    weights = {name: value + 0.01 for name, value in load_teacher(str(tiny_teacher)).network.state_dict().items()}
    write_checkpoint(out / "checkpoints", 7, weights, ranks=2)
    return out, weights


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_export(run, tmp_path, capsys, dtype):
    out, weights = run
    target = tmp_path / "export"
    assert cli.main(["export", "--run", str(out), "--out", str(target), "--dtype", dtype]) == 0
    assert "after 7 updates" in capsys.readouterr().out
    pipe, one_step = load_pipeline(target, "cpu")
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    assert one_step and all(torch.equal(value, weights[name].to(kind).float())
                            for name, value in pipe.unet.state_dict().items())
    assert read_distillation(target)["step"] == 7 and "after updates | 7" in (target / "README.md").read_text()
    assert {p.suffix for p in target.rglob("*") if p.is_file()} <= {".json", ".safetensors", ".py", ".md", ".txt"}
    assert [p.name for p in tmp_path.iterdir()] == ["export"]
    assert cli.main(["export", "--run", str(out), "--out", str(target)]) == 0            # an export is replaced


def test_export_of_bad_input(run, export, tiny_teacher, tmp_path, capsys):
    out, _ = run
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    broken = shutil.copytree(out, tmp_path / "broken")
    shutil.copytree(tiny_teacher, tmp_path / "pipeline")
    shutil.copytree(export, tmp_path / "exported")
    (tmp_path / "exported" / "lora.txt").write_text("x")
    (tmp_path / "link").symlink_to(export)
    next((broken / "checkpoints" / "step-00000007").glob("*.safetensors")).write_bytes(b"x")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for args, words in (
            (["--run", tmp_path, "--out", tmp_path / "e"], "no run directory"),
            (["--run", out, "--out", tmp_path / "mine"], "is no export"),
            (["--run", out, "--out", tmp_path / "pipeline"], "is no export"),
            (["--run", out, "--out", tmp_path / "exported"], "holds more than one"),
            (["--run", out, "--out", tmp_path / "link"], "is a link"),
            (["--run", out, "--out", tmp_path / "none" / "e"], "does not exist"),
            (["--run", out, "--checkpoint", tmp_path, "--out", tmp_path / "e"], "state.json is missing"),
            (["--run", broken, "--out", tmp_path / "e"], "no whole checkpoint is left")):
        assert cli.main(["export", *map(str, args)]) == 2
        assert words in capsys.readouterr().err
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
