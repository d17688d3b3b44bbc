"""A study on the CPU for real: killed and gone on with, what it leaves; and the documentation's own extensions."""

import json
import math
import re
import signal
import time

import pytest
import torch
from conftest import ROOT, Forked
from scipy import stats
from test_studies import fails

from sidfast import cli
from sidfast.common.errors import UserError


@pytest.fixture(scope="module")
def smoke(tiny_config, tmp_path_factory):
    """The path of a study of two variants and two seeds on a tiny teacher of 64 x 64 images."""
    from tiny import write_tiny_teacher

    folder = tmp_path_factory.mktemp("study")
    base = json.loads(json.dumps(tiny_config))
    base["model"]["teacher"] = str(write_tiny_teacher(folder / "teacher", levels=5, side=4))
    base["train"] |= {"save_every": 2, "log_every": 2, "sample_every": 1000}
    (folder / "base.json").write_text(json.dumps(base))
    path = folder / "smoke.json"
    path.write_text(json.dumps({
        "question": "Does it <work>?", "base": "base.json", "images": 16, "seeds": [0, 1], "teacher": [1.5],
        "variants": {"base": {}, "stale": {"synthetic.source": "stale", "synthetic.stale_by": 2}},
        "evaluation": {"images": 130, "points": 1, "samples": 2, "batch_size": 130}}))
    return path


def start(path, out, *args):
    return Forked("cli", ["ablate", path, "--out", out, *args], 29821)


def finish(process, code=0, timeout=500):
    _, errors = process.communicate(timeout=timeout)
    assert process.returncode == code, errors[-3000:]
    return errors


def plugin(folder):
    """A module of one's own, which changes nothing."""
    (folder / "mine.py").write_text("from sidfast.method.densities import Density\n"
                                    "class Mine(Density, name='mine'): ...\n")
    return folder / "mine.py"


@pytest.fixture(scope="module")
def whole(smoke, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    started = time.time()
    finish(start(smoke, out, "--import", plugin(smoke.parent)))
    print(f"smoke study: {time.time() - started:.0f} s")
    return out


def test_smoke_study_is_complete(whole):
    results = json.loads((whole / "results.json").read_text())
    for variant in results["variants"].values():
        assert [run["status"] for run in variant["runs"].values()] == ["done", "done"]
        assert variant["summary"]["fid_small_clip"]["n"] == 2
        for run in variant["runs"].values():
            assert [point["images"] for point in run["curve"]] == [0, 8, 16]
            assert run["curve"][-1]["accuracy"] == run["metrics"]["accuracy"]
    assert results["variants"]["stale"]["difference"]["fid_small_clip"]["n"] == 2
    costs = json.loads((whole / "costs.json").read_text())
    for cost in (cost for runs in costs.values() for cost in runs.values()):
        assert 0 < cost["training_s"] < cost["training_s"] + sum(cost["between_steps_s"].values()) < cost["wall_s"]
        assert cost["between_steps_s"]["evaluation"] > 0
    table = (whole / "table.md").read_text()
    assert "| stale | 2/2 |" in table and "| teacher, 50 steps, guidance 1.5 |" in table
    [teacher] = results["teacher"]
    assert teacher["guidance"] == 1.5 and teacher["summary"]["fid_small_clip"]["n"] == 2
    measured = json.loads((whole / "teacher" / "guidance-1.5" / "evaluated.json").read_text())
    assert measured["model"]["steps"] == 50 and measured["seeds"] == {"first": 0, "last": 259, "per_prompt": 1}
    assert teacher["summary"]["accuracy"]["mean"] == pytest.approx(measured["metrics"]["accuracy"])
    assert {"fid-clip.png", "fid-clip.svg", "fid-small-clip-images.png"} <= {p.name for p in whole.iterdir()}
    [imports] = {json.dumps(json.loads(p.read_text())["imports"]) for p in whole.glob("runs/*/*/config.json")}
    assert json.loads(imports).keys() == {"mine"}
    assert not list(whole.glob("runs/*/*/checkpoints")) and len(list(whole.glob("runs/*/*/export"))) == 4


def test_variants_show_the_same_start(whole):
    """Seeds and variants begin from one network, which is measured once."""
    starts = [json.loads(p.read_text())["curve"][0] for p in whole.glob("runs/*/*/result.json")]
    assert len(starts) == 4 and all(s == starts[0] for s in starts)
    assert (whole / "logs" / "worker-0.log").read_text().count("evaluate start:   0%") == 1


@pytest.mark.slow
def test_killed_study_ends_with_the_same_results(smoke, whole, tmp_path):
    """Killed with a run half way, and its worker with it; then with all but one run done."""
    out = tmp_path / "out"
    for condition in (lambda: list(out.glob("runs/stale/seed-0/checkpoints/step-*")),
                      lambda: len(list(out.glob("runs/*/*/result.json"))) == 3):
        process = start(smoke, out)
        deadline = time.time() + 400
        while not condition():
            assert process.poll() is None and time.time() < deadline, process.stderr.read()[-2000:]
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not (out / "results.json").exists()
    finish(start(smoke, out))
    assert (out / "results.json").read_bytes() == (whole / "results.json").read_bytes()


def test_finished_study_is_only_written_again(smoke, whole):
    before = (whole / "results.json").read_bytes()
    for name in ("results.json", "table.md", "report.html"):
        (whole / name).unlink()
    assert cli.main(["ablate", str(smoke), "--out", str(whole)]) == 0
    assert (whole / "results.json").read_bytes() == before and (whole / "report.html").exists()


def test_folder_of_another_study(capsys, smoke, whole, tmp_path):
    values = json.loads(smoke.read_text())
    for changes, key in (({"settings": {"loss.alpha": 0.5}}, "loss.alpha is 1.0 there and 0.5 here"),
                         ({"images": 15}, "train.images is 16 there and 15 here"),
                         ({"evaluation": values["evaluation"] | {"samples": 3}}, "train.samples is 2 there and 3")):
        (smoke.parent / "other.json").write_text(json.dumps(values | changes))
        line = fails(capsys, smoke.parent / "other.json", "--out", whole)
        assert "another study" in line and key in line


@pytest.mark.slow
def test_diverging_variant_stops_no_other(smoke, tmp_path):
    """Nor does one that fails for another reason, which is tried again next time."""
    values = json.loads(smoke.read_text())
    values |= {"seeds": [0], "variants": {
        "burst": {"optimizer.generator.lr": 1e30, "optimizer.fake_score.lr": 1e30}, "calm": {},
        "broken": {"synthetic.source": "broken"}}}
    (tmp_path / "own.py").write_text("from sidfast.method.synthetic import Source\n"
                                     "class Broken(Source, name='broken'):\n"
                                     "    def __call__(self, batch):\n"
                                     "        raise RuntimeError('on purpose')\n")
    path, out = smoke.parent / "diverging.json", tmp_path / "out"
    path.write_text(json.dumps(values))
    errors = finish(start(path, out, "--jobs", "2", "--import", tmp_path / "own.py"), code=1)
    assert "broken, seed 0: failed: RuntimeError: on purpose" in errors and "1 of 4" in errors
    runs = {name: v["runs"]["0"] for name, v in json.loads((out / "results.json").read_text())["variants"].items()}
    assert runs["burst"]["status"] == "diverged" and "diverged" in runs["burst"]["message"]
    assert runs["calm"]["status"] == "done" and runs["calm"]["metrics"]["fid_small_clip"] > 0
    assert runs["broken"]["status"] == "failed"
    assert "burst, seed 0: diverged" in (out / "table.md").read_text()
    stamps = {p: p.stat().st_mtime_ns for p in out.glob("runs/*/*/result.json") if "broken" not in str(p)}
    finish(start(path, out, "--import", tmp_path / "own.py"), code=1)
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items())


def test_report(whole):
    from test_report import Links

    page = (whole / "report.html").read_text()
    links = Links()
    links.feed(page)
    assert links.found and all(link.startswith(("data:", "#")) for link in links.found)
    assert "http:" not in page and "https:" not in page and set(re.findall(r"url\((.)", page)) == {"#"}
    assert "Does it &lt;work&gt;?" in page and page.count("images of base, seed") == 2


def test_report_in_a_browser(whole):
    from test_report import CHROMIUM, SVG_TEXT

    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 400, "height": 900}, color_scheme="dark")
        messages, requests = [], []
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto((whole / "report.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        shown = "es => es.filter(e => !e.hidden).map(e => e.dataset.seed)"
        assert page.eval_on_selector_all("#strips tr", shown) == ["0", "0"]
        page.check("input[value='1']")
        assert page.eval_on_selector_all("#strips tr", shown) == ["1", "1"]
        sizes, inks = page.evaluate(SVG_TEXT)
        assert min(sizes) >= 11 and "rgb(231, 232, 234)" in inks and "rgb(0, 0, 0)" not in inks
        widths = page.eval_on_selector_all("img", "es => es.map(e => e.naturalWidth)")
        assert all(widths) and widths[-1] == 2 * 64
        browser.close()
    assert messages == [] and [url for url in requests if not url.startswith(("data:", "file:"))] == []


# The documentation's two examples, word for word


def examples():
    """[(class, line of configuration)] of docs/ablations.md."""
    blocks = (ROOT / "docs" / "ablations.md").read_text().split("```")[1::2]
    classes = [b.removeprefix("python\n") for b in blocks if b.startswith("python\n")]
    settings = [json.loads(b.removeprefix("json\n")) for b in blocks if b.startswith("json\n") and "variants" not in b]
    return list(zip(classes, settings, strict=True))


def test_documented_extensions_work(tiny_config, known_again):
    from helpers_method import LOG_SIGMA, log_sigma_at, setting
    from test_batches import batches, joined
    from test_synthetic import source_of

    from sidfast.config.schema import build_config
    from sidfast.method import densities, synthetic

    (density, density_line), (source, source_line) = examples()
    assert max(len(code.strip().splitlines()) for code in (density, source)) <= 10
    with pytest.raises(UserError):
        build_config(tiny_config | density_line, "before")
    exec(density, vars(densities).copy())
    exec(source, vars(synthetic).copy())
    config = build_config(tiny_config | density_line | source_line, "after")

    t = torch.cat([joined(batches(noise=density_line["noise"])(step, "fake_score"))["t"] for step in range(200)])
    low, high = max(LOG_SIGMA[20], math.log(0.1)), min(LOG_SIGMA[979], math.log(10))
    assert stats.kstest((log_sigma_at(t) - low) / (high - low), "uniform").pvalue > 1e-3

    networks, batch = setting(num_extra_noise=1)[:2]
    mirrored = source_of(networks, **source_line["synthetic"])(batch)
    plain = source_of(networks)(batch)
    assert config.synthetic.source in synthetic.SOURCES
    assert torch.equal(mirrored, plain.flip(-1)) and not torch.equal(mirrored, plain)
