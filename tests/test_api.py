"""docs/api.md: its script trains, and computes what the float64 evaluation of method.md does; its names exist."""

import pydoc
import re

import pytest
import torch
from conftest import ROOT
from helpers_method import assert_close, in_float64, naive_fake_score_update, naive_generator_update

from sidfast.method import updates

PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
SCRIPT = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]


def run(script, folder, steps):
    """The names that the script leaves, for the tiny teacher."""
    random = torch.Generator().manual_seed(1)
    names = {"MODEL": str(folder), "STEPS": steps, "texts": lambda n: torch.randn(n, 3, 16, generator=random),
             "empty": torch.randn(1, 3, 16, generator=random), "perturb": perturb}
    exec(script.replace("(4, 64, 64)", "(4, 8, 8)"), names)
    return names


def perturb(network):
    with torch.no_grad():
        for p in network.parameters():
            p += 0.1 * torch.randn_like(p)


def test_the_script_is_short_and_trains(tiny_teacher):
    assert sum(bool(line.strip()) for line in SCRIPT.partition("N, SHAPE")[2].splitlines()) <= 23
    names = run(SCRIPT, tiny_teacher, 3)
    changed = {name: any(not torch.equal(p, q) for p, q in zip(
        names[name].parameters(), names["teacher"].parameters(), strict=True)) for name in ("generator", "fake_score")}
    assert changed == {"generator": True, "fake_score": True} and names["finite"].all()
    assert all(p.grad is None for network in ("teacher", "generator", "fake_score")
               for p in names[network].parameters())


def test_the_script_computes_the_method(tiny_teacher, monkeypatch):
    """Its gradients for three networks that differ, with learning rates of zero."""
    batches, batch_type = [], updates.Batch

    def recorded(*args, **options):
        batches.append(batch_type(*args, **options))
        return batches[-1]

    torch.manual_seed(2)
    script = SCRIPT.replace("adams = ", "perturb(generator)\nperturb(fake_score)\nadams = ")
    script = script.replace("lr=1e-6", "lr=0.0").replace("adams[network].zero_grad()", "pass")
    with monkeypatch.context() as patch:
        patch.setattr(updates, "Batch", recorded)
        names = run(script, tiny_teacher, 1)
    assert len(batches) == 2
    gradients = {name: {key: p.grad for key, p in names[name].named_parameters()} for name in (
        "fake_score", "generator")}
    networks = [names[name].double().requires_grad_() for name in ("generator", "fake_score", "teacher")]
    for name, naive, batch in zip(gradients, (naive_fake_score_update, naive_generator_update), batches, strict=True):
        loss, want = naive(networks, in_float64(batch), names["objective"])
        if name == "generator":
            assert names["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
        for key in want:
            if want[key].norm() > 0:
                assert_close(f"{name}: {key}", gradients[name][key], want[key], 1e-4)


def test_every_name_of_the_page_exists():
    named = re.findall(r"`(sidfast(?:\.\w+)+)`(?:, `(\w+)`)?", PAGE)
    assert len(named) >= 10
    for path, second in named:
        assert pydoc.locate(path) is not None, path
        assert not second or pydoc.locate(f"{path.rpartition('.')[0]}.{second}"), second
