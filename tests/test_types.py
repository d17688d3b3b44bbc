"""Public functions say the types of what they take and return; `make lint` checks them (pyproject.toml, tool.mypy)."""

import ast

import pytest
from conftest import ROOT

FOLDERS = ("kernels", "sidfast/method", "sidfast/accel", "sidfast/engines", "sidfast/teachers")
MODULES = [path.relative_to(ROOT) for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))
           if path.name != "sd_pipeline.py"]             # (it travels in exports, as it is)


def public(body, prefix=""):
    """(name, function) of the functions of a module and the methods of its classes without a leading underscore, but
    for Triton's kernels."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public(node.body, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            decorators = " ".join(map(ast.unparse, node.decorator_list))
            if "triton" not in decorators:
                yield f"{prefix}{node.name}", node


def untyped(source):
    """"function: argument" of every argument, and "function: return", without a type."""
    for name, function in public(ast.parse(source).body):
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        arguments = [a for k, a in enumerate(arguments) if not (k == 0 and a.arg in ("self", "cls"))]
        yield from (f"{name}: {a.arg}" for a in arguments if a.annotation is None)
        if function.returns is None:
            yield f"{name}: return"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_public_functions_are_typed(path):
    assert list(untyped((ROOT / path).read_text(encoding="utf-8"))) == []


def test_a_missing_type_is_seen():
    assert list(untyped("class A:\n    def f(self, x: int, y): ...\ndef _g(x): ...\ndef h() -> None: ...")) == [
        "A.f: y", "A.f: return"]
