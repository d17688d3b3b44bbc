"""RUN/report.html: complete, self-contained, and alive in a real browser."""

import ast
import base64
import html
import io
import json
import re
import shutil
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from sidfast import cli
from sidfast.common.files import drop_lock, take_lock
from sidfast.config.schema import load_config
from sidfast.evaluation.charts import COLORS, inline, line_chart, new_figure
from sidfast.evaluation.metrics import title
from sidfast.evaluation.report import _samples, duration
from sidfast.publishing.grid import image_grid, read_grid, save_grid

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory as training leaves it."""
    out = tmp_path_factory.mktemp("runs") / "a <b> run"
    (out / "samples").mkdir(parents=True)
    config = load_config(ROOT / "configs" / "ddpm.json").model_dump()
    (out / "config.json").write_text(json.dumps({
        "config": config, "command": ["train.py", "--config", "configs/ddpm.json"], "versions": {"torch": "2.15.0"},
        "git": "abc", "hardware": {"gpus": ["NVIDIA H200"] * 2, "cpus": 2}, "processes": 2,
        "started": "2026-11-30T23:59:07+00:00"}))
    lines = [{"step": n, "images": 16 * n, "fake_score_loss": 1 / n, "generator_loss": -0.1 * n, "non_finite": 0.0,
              "images_per_s": 4.0, "learning_rate/generator": 1e-6, "learning_rate/fake_score": min(n, 50) * 2e-8,
              "gradient_norm/generator": 50.0 / n, "gradient_norm/fake_score": None} for n in range(5, 241, 5)]
    measures = {"images": 1000, "accuracy": 0.618, "clip_score": 0.7854, "fid_small_clip": 12.84}
    spread = {"intervals": {"accuracy": [0.5875, 0.6476], "clip_score": [0.771, 0.8]}, "protocol": "p"}
    for n, accuracy in ((0, 0.09), (120, 0.4), (240, 0.618)):
        lines.append({"step": n} | {f"evaluation/{k}": v for k, v in (measures | {"accuracy": accuracy}).items()})
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 24')
    (out / "evaluation.json").write_text(json.dumps({
        "end": measures | spread | {"step": 240}, "step 120": measures | spread | {"step": 120},
        "start": measures | {"accuracy": 0.09}, "teacher": measures | {"fid_small_clip": 0.43}}))
    (out / "best").mkdir()
    (out / "best" / "distillation.json").write_text(json.dumps({
        "step": 120, "best_by": "fid_small_clip",
        "evaluation": measures | spread | {"fid_small_clip": 11.5, "step": 120}}))
    for n, color in ((0, "red"), (80, "green"), (240, "blue")):
        rows = {"teacher, 50 steps": "gray", "student at start": "red", f"student after {n}": color}
        save_grid(image_grid({label: [Image.new("RGB", (64, 64), c)] * 3 for label, c in rows.items()},
                             ["one", "two <i>", "three"]), out / "samples" / f"step-{n:08d}.png")
    assert cli.main(["report", "--run", str(out)]) == 0
    return out


class Links(HTMLParser):
    """Collects everything that could make a browser fetch something."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        if tag != "a":                                   # (which a reader must click)
            self.found += [value for name, value in attrs if name in (
                "src", "href", "xlink:href", "srcset", "action", "poster", "data")]


def test_page_is_self_contained_and_complete(run):
    page = (run / "report.html").read_text()
    links = Links()
    links.feed(page)
    assert sum(link.startswith("data:") for link in links.found) == 7            # images, and the icon
    assert all(link.startswith(("data:", "#")) for link in links.found)
    assert "http:" not in page and "@import" not in page and set(re.findall(r"url\((.)", page)) == {"#"}
    assert re.findall("https:[^\"]*", page) == ["https://arxiv.org/abs/2406.01561"]
    assert "a &lt;b&gt; run" in page and "<b> run" not in page
    assert all(word in page for word in ("0.618", "12.84", "guidance.kappa1", "2.15.0", "after 240 updates",
                                         "0.5875 to 0.6476", "11.5", "<td>best<small>after 120 updates</small>",
                                         "two &lt;i&gt;"))
    assert page.count("<svg") == 7                       # two of losses, norms, rates; three measures, speed; no memory
    assert page.count(">teacher</text>") == 3            # its numbers
    assert all(f">{title}</h3>" in page for title in ("Learning rates", "Gradient norms, before clipping"))
    for pattern in ("fetch(", "XMLHttpRequest", "<link rel=\"stylesheet", "<iframe"):
        assert pattern not in page


def facts_of(run):
    """{label: text} at the head of a run's report."""
    return dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", (run / "report.html").read_text()))


@pytest.fixture
def copy(run, tmp_path):
    """A run directory that a test may change, and `describe(**changes)` of its config.json."""
    copy = shutil.copytree(run, tmp_path / "run")

    def describe(**changes):
        described = json.loads((copy / "config.json").read_text()) | changes
        (copy / "config.json").write_text(json.dumps(described))
        return described

    return copy, describe


def test_how_far_and_how_long(run, copy):
    """Updates and their total, and time of training by the rates: 240 of 16 images at 4 a second."""
    facts = facts_of(run)
    assert facts["Updates"] == "240 of 240" and facts["Started"] == "2026-11-30 23:59 UTC"
    assert facts["Training, without samples and measures"] == "16 min 0 s" and facts["GPU-hours of training"] == "0.533"
    copy, describe = copy
    config = describe()["config"]
    describe(config=config | {"train": config["train"] | {"steps": None, "images": 100 * 16 * 240 - 1}},
             hardware={"gpus": [], "cpus": 2}, started=None)
    assert cli.main(["report", "--run", str(copy)]) == 0
    facts = facts_of(copy)
    assert facts["Updates"] == "240 of 24,000, stopped"
    assert "Started" not in facts and "GPU-hours of training" not in facts
    lock = take_lock(copy / ".lock")
    assert cli.main(["report", "--run", str(copy)]) == 0 and facts_of(copy)["Updates"] == "240 of 24,000, running"
    drop_lock(lock)


@pytest.mark.parametrize("seconds, text", [(9.96, "10.0 s"), (60, "1 min 0 s"), (3599.7, "60 min 0 s"),
                                           (3661, "1 h 1 min"), (100000, "1 d 4 h")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_numbers_of_a_teacher_that_was_not_measured(copy):
    """Those of its own file that do not depend on the count of images."""
    copy, describe = copy
    known = json.loads((copy / "evaluation.json").read_text())
    del known["teacher"]
    (copy / "evaluation.json").write_text(json.dumps(known))
    describe(paths={"model.teacher": str(ROOT / "assets" / "teacher")})
    assert cli.main(["report", "--run", str(copy)]) == 0
    page = (copy / "report.html").read_text()
    row, = re.findall("<tr><td>teacher<small>of its own card</small></td>.*?</tr>", page, re.DOTALL)
    assert re.findall("<td>(.*?)</td>", row)[1:] == ["5,000", "0.9986", "0.9206", ""]        # (no FID)
    assert page.count(">teacher</text>") == 2
    describe(paths={"model.teacher": str(copy)})
    assert cli.main(["report", "--run", str(copy)]) == 0
    assert "<td>teacher<" not in (copy / "report.html").read_text()


def test_command_as_one_would_type_it(copy, tmp_path, monkeypatch):
    """It runs as it stands: with the launcher, from the folder where it was started. Paths below that are shown from
    there; what the launcher adds is left out."""
    monkeypatch.chdir(tmp_path)
    copy, describe = copy
    describe(folder=str(tmp_path / "else where"))
    assert cli.main(["report", "--run", "run"]) == 0
    assert html.escape(f"cd '{tmp_path}/else where' && deepspeed --num_gpus 2 train.py --config configs/ddpm.json"
                       ).replace("&#x27;", "&#39;") in (copy / "report.html").read_text()
    described = describe(folder=str(tmp_path), hardware={"gpus": []})
    described["command"] = [f"{tmp_path}/sidfast/train.py", "--local_rank=0", "--config",
                            f"{tmp_path}/my configs/a.json", f"--out={tmp_path}/runs/a", "--set",
                            f"model.teacher={tmp_path}", "data.prompts=/else/p.txt"]
    (copy / "config.json").write_text(json.dumps(described))
    assert cli.main(["report", "--run", "run"]) == 0
    assert "<code>" + html.escape(
        "deepspeed sidfast/train.py --config 'my configs/a.json' --out=runs/a --set model.teacher=. "
        "data.prompts=/else/p.txt").replace("&#x27;", "&#39;") + "</code>" in (copy / "report.html").read_text()
    describe(command=["/x/bin/sidfast", "train", "--config", "a.json"])
    assert cli.main(["report", "--run", "run"]) == 0
    assert "<code>sidfast train --config a.json</code>" in (copy / "report.html").read_text()


def test_grid_gives_its_images_back(tmp_path):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)) for _ in range(4)]
    save_grid(image_grid({"a": images[:2], "b": images[2:]}, ["x", "y"]), tmp_path / "grid.png")
    prompts, rows = read_grid(tmp_path / "grid.png")
    assert prompts == ["x", "y"] and list(rows) == ["a", "b"]
    assert all(np.array_equal(a, b) for a, b in zip(images, rows["a"] + rows["b"], strict=True))
    images[0].save(tmp_path / "other.png")
    assert read_grid(tmp_path / "other.png") is None


def test_large_images_and_many_steps_stay_small(run, tmp_path):
    """A picture of 320 pixels is shown at 256, and of many steps 24 are, with the first and the last."""
    copy = shutil.copytree(run, tmp_path / "run")
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (320, 320, 3), np.uint8))]
    grid = image_grid({"teacher": noise, "start": noise, "now": noise}, ["x"])
    shutil.rmtree(copy / "samples")
    (copy / "samples").mkdir()
    save_grid(grid, copy / "samples" / "step-00000000.png")
    for n in range(1, 40):
        (copy / "samples" / f"step-{n:08d}.png").hardlink_to(copy / "samples" / "step-00000000.png")
    samples = _samples(copy)
    steps = [frame["step"] for frame in samples["frames"]]
    assert len(steps) == 24 and steps[0] == 0 and steps[-1] == 39 and not samples["small"]
    image = Image.open(io.BytesIO(base64.b64decode(samples["frames"][0]["images"][0].split(",")[1])))
    assert image.size == (256, 256) and image.format == "WEBP"


@pytest.mark.parametrize("content", ["{", "[]", '{"config": 1}', '{"config": {"guidance": {}}}'])
def test_config_that_is_none(tmp_path, capsys, content):
    (tmp_path / "config.json").write_text(content)
    assert cli.main(["report", "--run", str(tmp_path)]) == 2
    assert "no run directory" in capsys.readouterr().err


def test_no_run_directory(tmp_path, capsys):
    assert cli.main(["report", "--run", str(tmp_path)]) == 2
    assert "no run directory" in capsys.readouterr().err and not any(tmp_path.iterdir())


@pytest.mark.parametrize("log", [False, True], ids=["linear", "log"])
@pytest.mark.parametrize("points", [
    [(0, 1.0)], [(0, 3.0), (5, 3.0)], [(1, float("nan")), (2, -1e-9), (9, 2e6)], [(0, 1e-13), (1, 3e-13)],
    [(0, 1.0), (1, 1 + 2e-16)], [(0, 5e-324), (1, 1e-320)], [(0, -9e99), (2**62, 9e99)], [(7, 0.0), (7, -0.0)],
    [(2**63 - 2, 1e-99), (2**63 - 1, 1e99)], [(0, 1e308), (1, 1e-200), (2, float("inf"))]],
    ids=["one", "constant", "wide", "tiny", "nearly-equal", "denormal", "huge", "zero", "steps", "left-out"])
def test_chart_stays_in_its_frame(points, log):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = line_chart({"a": points}, "x", None, log)
    frame = [float(v) for v in re.search('<rect x="(.*?)" y="(.*?)" width="(.*?)" height="(.*?)"', svg).groups()]
    spots = points_of(svg)
    assert len(spots) == sum(abs(y) < 1e100 for _, y in points)
    for x, y in spots:
        assert frame[0] <= x <= frame[0] + frame[2] and frame[1] <= y <= frame[1] + frame[3]
    heights = re.findall('text-anchor: end" x="[^"]*" y="([^"]*)"', svg)
    assert len(set(heights)) == len(heights) >= 2        # numbers of the axis are apart
    assert line_chart({"a": [(1, float("nan")), (2, 1e101)]}, "x") is None


def points_of(svg):
    """[(x, y), ...] of the first line's points, from the left."""
    return [tuple(map(float, spot)) for spot in re.findall(
        'x="([^"]*)" y="([^"]*)" style="fill: var\\(--a\\)', svg.split("<g clip-path")[1].split("</g>")[0])]


def test_chart_is_drawn_to_scale():
    """Twice as far is twice as far, in the same bytes each time; on a logarithmic axis ten times is."""
    (x0, y0), (x1, y1), (x2, y2) = points_of(line_chart({"a": [(0, 1.0), (2, 9.0), (1, 3.0)]}, "x"))
    assert x2 - x1 == pytest.approx(x1 - x0) and (y0 - y2) / (y0 - y1) == pytest.approx(4, rel=1e-4)
    args = {"a": [(0, 1.0), (1, 10.0), (2, 100.0)]}, "x", ("teacher", 50.0), True
    svg = line_chart(*args)
    assert svg == line_chart(*args) and ">teacher</text>" in svg
    (_, y0), (_, y1), (_, y2) = points_of(svg)
    assert y0 - y1 == pytest.approx(y1 - y2, rel=1e-4)


def test_colours_of_a_figure_are_the_page_s():
    """Black lines are the page's ink and white ones its cards, or the dark page would hide or show them too much."""
    figure, axes = new_figure(3, 2)
    axes.plot([0, 1], [0, 1], "o-", color="black", markerfacecolor="white")
    axes.plot([0, 1], [1, 0], color=COLORS[1])
    svg = inline(figure, 'a "b"')
    assert "#000000" not in svg and "#ffffff" not in svg and COLORS[1] not in svg
    assert all(color in svg for color in ("stroke: currentColor", "fill: var(--card)", "stroke: var(--b)"))
    assert svg.startswith('<svg viewBox="0 0 216 144"') and 'aria-label="a &quot;b&quot;"' in svg


# The sizes in pixels in which the page shows the texts of its plots, and their colours.
SVG_TEXT = """(() => { const texts = [...document.querySelectorAll("svg text")].map(e => [e, e.closest("svg")]);
    return [texts.map(([e, svg]) => parseFloat(getComputedStyle(e).fontSize) *
                                    svg.getBoundingClientRect().width / svg.viewBox.baseVal.width),
            [...new Set(texts.map(([e]) => getComputedStyle(e).fill))]]; })()"""


def colors(page, selector):
    """[[r, g, b], ...]: the first pixel of each image that matches in the page."""
    return page.evaluate("""async selector => Promise.all([...document.querySelectorAll(`#pairs ${selector}`)].map(
        async image => {
            await image.decode();
            const canvas = document.createElement("canvas");
            const pen = canvas.getContext("2d");
            pen.drawImage(image, 0, 0);
            return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3);
        }))""", selector)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [1400, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(run, width, scheme):
    """No console message, no request, no sideways scrolling; the slider changes the student's pictures."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        messages, requests = [], []
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto((run / "report.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert page.inner_text("#shown") == "after 240 updates"
        page.focus("#step")
        page.keyboard.press("ArrowLeft")
        assert page.inner_text("#shown") == "after 80 updates"
        assert colors(page, ".student") == [[0, 128, 0]] * 3 and colors(page, "img:not(.student)") == [[128] * 3] * 3
        page.keyboard.press("Home")
        assert page.inner_text("#shown") == "after 0 updates" and colors(page, ".student") == [[255, 0, 0]] * 3
        inside = page.evaluate("""[...document.querySelectorAll('.pair img, svg')].every(
            e => e.getBoundingClientRect().right <= innerWidth && e.getBoundingClientRect().width > 50)""")
        assert inside
        sizes, inks = page.evaluate(SVG_TEXT)
        assert min(sizes) >= 11 and inks == {"light": ["rgb(27, 29, 34)"], "dark": ["rgb(232, 233, 235)"]}[scheme]
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == {"light": "rgb(251, 250, 248)", "dark": "rgb(20, 22, 26)"}[scheme]
        browser.close()
    assert messages == []
    assert [url for url in requests if not url.startswith(("data:", "file:"))] == [] and len(
        [url for url in requests if url.startswith("file:")]) == 1


def with_teacher(run, copy, teacher):
    """A copy of a run directory that names another teacher."""
    shutil.copytree(run, copy)
    described = json.loads((copy / "config.json").read_text())
    described["config"]["model"]["teacher"] = teacher
    (copy / "config.json").write_text(json.dumps(described))
    return copy


@pytest.mark.parametrize("head, words", [
    ("---\nlicense: creativeml-openrail-m\ntags: [x]\n---\n# SD\n",
     ["license: creativeml-openrail-m\n", "That of the teacher"]),
    ("# SD\n", ["states no licence"])], ids=["licence", "none"])
def test_model_card(run, tmp_path, head, words):
    from sidfast.publishing.card import write_card

    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "README.md").write_text(head)
    copy = with_teacher(run, tmp_path / "run", str(teacher))
    write_card(copy, copy / "export", title)
    assert not (copy / "export").exists()                # nothing to describe
    (copy / "export").mkdir()
    (copy / "export" / "distillation.json").write_text('{"step": 240}')
    write_card(copy, copy / "export", title)
    (copy / "export" / "distillation.json").unlink()
    card = (copy / "export" / "README.md").read_text()
    assert all(word in card for word in [
        *words, "library_name: diffusers", "| t_init | 625 |", "(grid.png)", "1.5, 1.5, 1.5, 1.5",
        "| this generator | 1000 | 0.618 (0.5875 to 0.6476) | 0.7854 (0.771 to 0.8) | 12.84 |",
        "| images seen | 3,840 |", "| hours of training | 0.267 |", "| GPU-hours | 0.533 |", "| torch | 2.15.0 |",
        "| hardware | 2 x NVIDIA H200 |", "from diffusers import DiffusionPipeline\n", "- one-step\n",
        "@inproceedings{"])
    ast.parse(re.search("```python\n(.*?)```", card, re.DOTALL)[1])
    assert sorted(p.name for p in (copy / "export").iterdir()) == ["README.md", "grid.png"]
    assert read_grid(copy / "export" / "grid.png")[1]["student after 240"][0].getpixel((0, 0)) == (0, 0, 255)
    shutil.copy(copy / "best" / "distillation.json", copy / "export")
    write_card(copy, copy / "export", title)
    card = (copy / "export" / "README.md").read_text()
    assert "| after updates | 120 |" in card and "| chosen as the best of the run by | FID (small CLIP) |" in card
    assert "| this generator | 1000 | 0.618 (0.5875 to 0.6476) | 0.7854 (0.771 to 0.8) | 11.5 |" in card
    assert "12.84 |\n| this" in card and "(grid.png)" not in card               # (no grid is of that step)
    assert "| images seen | 1,920 |" in card and "| hours of training | 0.133 |" in card


@pytest.mark.parametrize("teacher, readme, words", [
    ("someone/sd", "---\nlicense: openrail++\n---\n", ["license: openrail++\n", "`openrail++`, as its README.md"]),
    ("someone/sd", "# SD\n", ["README.md on the hub states no licence"]),
    ("someone/sd", None, ["`someone/sd`, whose README.md was not at hand"]),
    ("../sd", None, ["`../sd`, whose README.md was not at hand"])], ids=["licence", "none", "unknown", "folder gone"])
def test_licence_of_a_hub_teacher(run, tmp_path, monkeypatch, teacher, readme, words):
    """From the hub's cache on this machine, as a download leaves it."""
    from sidfast.publishing.card import write_card

    cache = tmp_path / "hub" / "models--someone--sd"
    (cache / "snapshots" / "0123").mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123")
    if readme:
        (cache / "snapshots" / "0123" / "README.md").write_text(readme)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    copy = with_teacher(run, tmp_path / "run", teacher)
    (copy / "export").mkdir()
    write_card(copy, copy / "export", title)
    card = (copy / "export" / "README.md").read_text()
    assert all(word in card for word in words) and ("license:" in card) == ("license:" in (readme or ""))
    assert "base_model:" not in card                     # (an older run, which does not say where the teacher was)
    described = json.loads((copy / "config.json").read_text())
    for place, stated in ((teacher, teacher == "someone/sd"), (str(tmp_path / teacher), False)):
        (copy / "config.json").write_text(json.dumps(described | {"paths": {"model.teacher": place}}))
        write_card(copy, copy / "export", title)
        assert ("\nbase_model: someone/sd\n" in (copy / "export" / "README.md").read_text()) == stated


def test_a_download_brings_the_licence(monkeypatch, tmp_path):
    from sidfast.publishing.load import find_pipeline
    from sidfast.teachers.load import find_teacher

    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns, **options: (
        asked.append(allow_patterns), tmp_path)[1])
    for find in (find_teacher, find_pipeline):
        assert find("someone/sd") == tmp_path
    assert all("README.md" in patterns for patterns in asked) and len(asked) == 2
