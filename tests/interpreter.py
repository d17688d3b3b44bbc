"""Triton's interpreter in less time."""

import inspect

from triton import language
from triton.runtime import interpreter


def patch_once():
    """Triton's language is made the interpreter's at the start of a kernel, and not again by every function that the
    kernel calls: they find nothing left to change, and looking for it takes a third of the time."""
    patch = interpreter._patch_lang

    def patch_what_is_left(fn):
        used = [m for m in fn.__globals__.values() if inspect.ismodule(m) and m in (language, language.core)]
        if any(language.core.is_builtin(module.load) for module in used):
            return patch(fn)
        return None

    interpreter._patch_lang = patch_what_is_left
