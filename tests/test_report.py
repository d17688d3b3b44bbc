"""RUN/report.html: complete, self-contained, and alive in a real browser."""

import json
import shutil
from html.parser import HTMLParser

import pytest
from conftest import ROOT
from PIL import Image

from sidfast import cli
from sidfast.config import load_config
from sidfast.evaluation.charts import line_chart

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory as training leaves it."""
    out = tmp_path_factory.mktemp("runs") / "a <b> run"
    (out / "samples").mkdir(parents=True)
    config = load_config(ROOT / "configs" / "ddpm.json").model_dump()
    (out / "config.json").write_text(json.dumps({
        "config": config, "command": ["train.py", "--config", "configs/ddpm.json"], "versions": {"torch": "2.15.0"},
        "git": "abc", "hardware": {"gpus": [], "cpus": 2}, "processes": 1}))
    lines = [{"step": n, "images": 16 * n, "fake_score_loss": 1 / n, "generator_loss": -0.1 * n, "non_finite": 0.0,
              "images_per_s": 20.0 + n} for n in range(5, 241, 5)]
    measures = {"images": 1000, "accuracy": 0.618, "clip_score": 0.7854, "fid_small_clip": 12.84}
    for n, accuracy in ((0, 0.09), (120, 0.4), (240, 0.618)):
        lines.append({"step": n} | {f"evaluation/{k}": v for k, v in (measures | {"accuracy": accuracy}).items()})
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 24')
    (out / "evaluation.json").write_text(json.dumps({"end": measures, "start": measures | {"accuracy": 0.09}}))
    for n, color in ((0, "red"), (80, "green"), (240, "blue")):
        Image.new("RGB", (1200, 500), color).save(out / "samples" / f"step-{n:08d}.png")
    assert cli.main(["report", "--run", str(out)]) == 0
    return out


class Links(HTMLParser):
    """Collects everything that could make a browser fetch something."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "poster", "data")]


def test_page_is_self_contained_and_complete(run):
    page = (run / "report.html").read_text()
    links = Links()
    links.feed(page)
    assert len(links.found) == 4 and all(link.startswith("data:") for link in links.found)       # grids, and the icon
    assert "http:" not in page and "https:" not in page and "@import" not in page and "url(" not in page
    assert "a &lt;b&gt; run" in page and "<b> run" not in page
    assert all(word in page for word in ("0.618", "12.84", "guidance.kappa1", "2.15.0", "after 240 updates"))
    assert page.count("<svg") == 5                       # losses, three measures, speed; nothing of a GPU


def test_no_run_directory(tmp_path, capsys):
    assert cli.main(["report", "--run", str(tmp_path)]) == 2
    assert "no run directory" in capsys.readouterr().err and not any(tmp_path.iterdir())


@pytest.mark.parametrize("points", [[(0, 1.0)], [(0, 3.0), (5, 3.0)], [(1, float("nan")), (2, -1e-9), (9, 2e6)]],
                         ids=["one", "constant", "wide"])
def test_chart_stays_in_its_frame(points):
    import re

    svg = line_chart({"a": points}, "x")
    spots = re.search(r'points="([^"]*)"', svg)[1].split()
    for spot in spots:
        x, y = map(float, spot.split(","))
        assert 58 <= x <= 448 and 12 <= y <= 200
    assert line_chart({"a": [(1, float("nan"))]}, "x") is None


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [1400, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(run, width, scheme):
    """No console message, no request, no sideways scrolling; the slider changes the picture."""
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
        shown = page.eval_on_selector_all("#grids img", "es => es.map(e => getComputedStyle(e).display !== 'none')")
        assert shown == [False, True, False]
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == {"light": "rgb(251, 250, 248)", "dark": "rgb(20, 22, 26)"}[scheme]
        browser.close()
    assert messages == []
    assert [url for url in requests if not url.startswith(("data:", "file:"))] == [] and len(
        [url for url in requests if url.startswith("file:")]) == 1


@pytest.mark.parametrize("head, words", [
    ("---\nlicense: creativeml-openrail-m\ntags: [x]\n---\n# SD\n",
     ["license: creativeml-openrail-m\n", "That of the teacher"]),
    ("# SD\n", ["states no licence"])], ids=["licence", "none"])
def test_model_card(run, tmp_path, head, words):
    from sidfast.publishing.card import write_card

    copy, teacher = shutil.copytree(run, tmp_path / "run"), tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "README.md").write_text(head)
    described = json.loads((copy / "config.json").read_text())
    described["config"]["model"]["teacher"] = str(teacher)
    (copy / "config.json").write_text(json.dumps(described))
    write_card(copy)
    assert not (copy / "export").exists()                # nothing to describe
    (copy / "export").mkdir()
    write_card(copy)
    card = (copy / "export" / "README.md").read_text()
    assert all(word in card for word in [*words, "library_name: diffusers", "| end | 1000 | 0.618 | 0.7854 | 12.84 |",
                                         "| t_init | 625 |", "(grid.png)", "1.5, 1.5, 1.5, 1.5"])
    assert sorted(p.name for p in (copy / "export").iterdir()) == ["README.md", "grid.png"]
    assert Image.open(copy / "export" / "grid.png").getpixel((0, 0)) == (0, 0, 255)
