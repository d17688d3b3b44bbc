"""What is importable: the kernels of this package are `sidfast.kernels`, and `kernels` is somebody else's package."""

import importlib
import sys
from pathlib import Path

import pytest

import sidfast
from sidfast.common.environment import hide_checkout

CHECKOUT = Path(sidfast.__file__).parents[1]


@pytest.mark.parametrize("before", [None, "", ".", f"{CHECKOUT}/", f"{CHECKOUT}/docs/.."])
def test_another_package_called_kernels(monkeypatch, tmp_path, before):
    """In this process as it is (`python -m pytest` puts the checkout on its path), and with it there once more."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("MARK = 'another'")
    monkeypatch.chdir(CHECKOUT)
    monkeypatch.setattr(sys, "path", [*([] if before is None else [before]), *sys.path, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    if before is not None:
        hide_checkout()
    assert importlib.import_module("kernels").MARK == "another"
    del sys.modules["kernels"]
    assert Path(importlib.import_module("sidfast.kernels.geglu").__file__) == CHECKOUT / "kernels" / "geglu.py"
