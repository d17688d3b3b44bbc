"""`sidfast demo`: a page on this machine, of a student and its teacher, with their times. Nothing leaves it."""

import errno
import getpass
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from sidfast.common.errors import UserError, say
from sidfast.common.extras import need
from sidfast.common.records import read_run, recorded
from sidfast.publishing.export import read_distillation
from sidfast.publishing.generate import make_images, to_pil
from sidfast.publishing.load import find_pipeline, load_pipeline
from sidfast.teachers.fingerprint import TEACHER, describe_teacher, teacher_change
from sidfast.teachers.load import load_teacher
from sidfast.teachers.tokenizer import build_tokenizer

_SHAPES = ("a small red circle above a large blue square on a white background",
           "a large green square on a gray background", "a small yellow cross on a black background")
_PHOTOS = ("a lighthouse on a cliff in a storm, oil painting", "portrait of an old fisherman, studio light, 85 mm",
           "a red fox in fresh snow, morning light", "a bowl of ramen on a wooden table, seen from above")
_CSS = """.picture img { width: 100%; height: 100%; object-fit: contain; }
@media (max-width: 640px) { .picture { height: auto !important; aspect-ratio: 1; } }"""
_STEPS = 50                                              # of a teacher, until the sliders are moved, and its guidance:
_GUIDANCE = {"shapes": 1.5, "photos": 7.5}
_MOST_STEPS, _MOST_GUIDANCE = 100, 10
_LOCAL, _ALL = ("127.0.0.1", "localhost", "::1"), ("0.0.0.0", "::")
_NARROW = 280                                            # pixels; fields of a row stand below each other on a phone
_MOST_SEED, _MOST_TEXT = 2**63 - 1, 10_000               # PyTorch's; characters, far more than a text encoder takes


@dataclass
class Model:
    """A pipeline that has run once, so that its times are not those of the first call."""

    name: str
    pipe: object
    one_step: bool
    guidance: float                                      # of its teacher, or its own if it takes several steps

    @property
    def prompts(self):
        """Prompts to begin with: of the shapes world, which its teacher alone knows, or of what others draw."""
        return _SHAPES if _knows_shapes(self.pipe) else _PHOTOS

    def __call__(self, prompt, seed, steps=None, guidance=None):
        """(PIL image, seconds from the prompt to it). The noise depends on the seed alone, for every model. Raises
        UserError for a model that cannot make a finite image."""
        options = {} if self.one_step else {"num_inference_steps": steps, "guidance_scale": guidance}
        self._wait()
        started = time.perf_counter()
        image, = to_pil(make_images(self.pipe, [prompt], [seed], **options), self.name)
        self._wait()
        return image, time.perf_counter() - started

    def _wait(self):
        if self.pipe.device.type == "cuda":
            torch.cuda.synchronize()


def open_models(model, teacher, device):
    """The Model asked for, and that of its teacher, or None where there is none.

    `teacher`: a folder or hub id; None for the one that the model's export names, if it is a folder here. Raises
    UserError for what cannot be loaded, and for one that has changed since.
    """
    if teacher is None:
        teacher = _named_teacher(model, find_pipeline(model))
    student = _open(model, device)
    if teacher is not None and student.one_step:
        return student, _open(teacher, device, "--teacher")
    if teacher is not None:
        raise UserError(f"--teacher {teacher}: {model} takes several steps itself; a one-step generator has a teacher")
    return student, None


def build_demo(student, teacher):
    """The gradio page of one or two Models. Raises UserError where gradio is not installed."""
    gr = _gradio()

    def run(model, *inputs):
        try:
            prompt, seed, steps, guidance = check_inputs(*inputs)
            image, seconds = model(prompt, seed, steps, guidance)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None
        took = "1 step" if model.one_step else f"{steps} steps, guidance {guidance:g}"
        return image, f"**{seconds:.3f} s** · {took}"

    def next_seed(seed):
        try:
            return 1 if seed is None else _whole("The seed", seed, 0, _MOST_SEED - 1) + 1
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None

    with gr.Blocks(title="sidfast", analytics_enabled=False) as page:
        gr.Markdown(f"# sidfast\n`{student.name}`" + (f" and its teacher, `{teacher.name}`" if teacher else ""))
        inputs = prompt, seed, *_ = _inputs(gr, student, teacher)
        with gr.Row():
            go = gr.Button("Make", variant="primary")
            again = gr.Button("Next seed")
        shown = []
        with gr.Row(equal_height=True):
            for label, model in (("Student", student), ("Teacher", teacher)):
                if model:
                    with gr.Column():
                        image = gr.Image(label=label, interactive=False, height=420, format="png",
                                         buttons=["download"], elem_classes="picture")
                        shown.append((label.lower(), model, [image, gr.Markdown()]))
        starts = [go.click, prompt.submit,
                  again.click(next_seed, seed, seed, show_progress="hidden", api_name="next_seed",
                              preprocess=False).then]
        for start in starts:
            public = start is starts[0]                  # one of them is enough for a program that calls the page
            for name, model, outputs in shown:           # the student first: it need not wait for the teacher
                start = start(_bind(run, model), list(inputs), outputs, concurrency_limit=1, concurrency_id="models",
                              preprocess=False,          # (of gradio, which prints tracebacks: `check_inputs` does it)
                              api_name=name if public else None,
                              api_visibility="public" if public else "private").then
    return page


def _inputs(gr, student, teacher):
    """The fields of the page: prompt, seed, steps, guidance."""
    with gr.Row():
        prompt = gr.Textbox(label="Prompt", value=student.prompts[0], scale=5, min_width=_NARROW, autofocus=True)
        seed = gr.Number(label="Seed", value=0, precision=0, minimum=0, scale=1)
    gr.Examples([[text] for text in student.prompts[1:]], prompt, label="Prompts to try", api_name=None,
                api_visibility="private")                # (gradio shows 60 characters)
    of = " of the teacher" if teacher else ""
    with gr.Row(visible=bool(teacher) or not student.one_step):
        steps = gr.Slider(1, _MOST_STEPS, _STEPS, step=1, label=f"Steps{of}", min_width=_NARROW)
        guidance = gr.Slider(0, _MOST_GUIDANCE, student.guidance, step=0.1, label=f"Guidance{of}", min_width=_NARROW)
    return prompt, seed, steps, guidance


def run_demo(model, teacher, host, port, device):
    """Serve the page at an address of this machine until interrupted. Raises UserError for whatever is at fault."""
    check_address(host, port)
    gr = _gradio()
    page = build_demo(*open_models(model, teacher, device))
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        page.queue().launch(server_name=host, server_port=port, share=False, inbrowser=False, ssr_mode=False,
                            theme=theme, css=_CSS, footer_links=[], quiet=True, prevent_thread_lock=True)
    except OSError as error:
        raise UserError(f"--port {port}: {str(error).splitlines()[0]}") from None
    say(address_text(host, port))
    page.block_thread()


def check_address(host, port):
    """Raise UserError for a port or an address that a page cannot have here."""
    if not 1 <= port <= 65535:
        raise UserError(f"--port must be at least 1 and at most 65535, not {port}")
    try:
        family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        socket.create_server(place, family=family).close()
    except (OSError, UnicodeError) as error:             # (UnicodeError: no name that a host can have)
        option = f"--port {port}" if getattr(error, "errno", None) in (errno.EADDRINUSE, errno.EACCES) else (
            f"--host {host}")
        raise UserError(f"{option}: the page cannot be there ({getattr(error, 'strerror', None) or error})") from None


def address_text(host, port):
    """Where the page is, for the user: lines."""
    name = socket.gethostname()
    shown = name if host in _ALL else f"[{host}]" if ":" in host else host
    more = (f"from another machine: ssh -N -L {port}:{shown}:{port} {getpass.getuser()}@{name}, then the same address "
            "there" if host in _LOCAL else "whoever reaches this address can use the page, without a password")
    return f"sidfast: http://{shown}:{port} (Ctrl-C ends it)\nsidfast: {more}"


def check_inputs(prompt, seed, steps, guidance):
    """What the page, or a program that calls it, sent. Raises UserError for anything but a prompt and numbers in the
    ranges of the page."""
    if not isinstance(prompt, str):
        raise UserError("The prompt must be text.")
    if not prompt.strip():
        raise UserError("A prompt is needed.")
    if len(prompt) > _MOST_TEXT or any("\ud800" <= c <= "\udfff" for c in prompt):
        raise UserError(f"The prompt must be at most {_MOST_TEXT} characters of Unicode.")
    seed, steps = _whole("The seed", seed, 0, _MOST_SEED), _whole("The steps", steps, 1, _MOST_STEPS)
    if not _is_number(guidance) or not 0 <= guidance <= _MOST_GUIDANCE:
        raise UserError(f"The guidance must be a number from 0 to {_MOST_GUIDANCE}.")
    return prompt, seed, steps, guidance


def _whole(name, value, least, most):
    if not _is_number(value) or not least <= value <= most or value != int(value):
        raise UserError(f"{name} must be a whole number from {least} to {most}.")
    return int(value)


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def _named_teacher(model, folder):
    """The folder of the teacher that an export names, where its run found it or under that name here, or None."""
    about, known = read_distillation(folder), {}
    if (folder.parent / "config.json").is_file():
        described = read_run(folder.parent, f"--model {model}: no run directory", "name the export itself")
        known = recorded(described, "paths")
    places = known.get(TEACHER), about.get("teacher")
    place = next((name for name in places if isinstance(name, str) and Path(name).is_dir()), None)
    if place and isinstance(about.get("inputs"), dict):
        change = teacher_change(about["inputs"], describe_teacher(load_teacher(place)))
        if change:
            raise UserError(f"--model {model}: its teacher, {place}, is not what it was distilled from ({change}); "
                            "name the folder to show as --teacher DIR")
    return place


def _bind(run, model):
    return lambda *inputs: run(model, *inputs)


def _gradio():
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"     # before it is imported
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    return need("gradio", "demo", "sidfast demo")


def _open(model, device, option="--model"):
    pipe, one_step = load_pipeline(model, device, torch.float16 if device.type == "cuda" else torch.float32, option)
    pipe.set_progress_bar_config(disable=True)
    known = read_distillation(find_pipeline(model, option)).get("guidance", {}).get("kappa4")
    usual = _GUIDANCE["shapes" if _knows_shapes(pipe) else "photos"]
    opened = Model(str(model), pipe, one_step, min(known or usual, _MOST_GUIDANCE))
    opened("", 0, 2, opened.guidance)
    return opened


def _knows_shapes(pipe):
    """Whether a pipeline's texts are those of the shapes world, by its tokenizer."""
    tokenizer = getattr(pipe, "tokenizer", None)
    return tokenizer is not None and tokenizer.get_vocab() == build_tokenizer().get_vocab()
