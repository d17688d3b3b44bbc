"""Triton's interpreter in a third of the time, which goes into describing types and shapes: always the same ones.

What a kernel computes stays as it is.
"""

import functools
import types

import numpy as np
from triton import language
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def speed_up():
    """For this process, whose kernels all run in the interpreter."""
    interpreter._patch_lang = _patch_once(interpreter._patch_lang)
    interpreter._get_np_dtype = _numpy_types(interpreter._get_np_dtype)
    # Without `debug` an overflow that was found would have no consequence.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    core.block_type.__init__, core.block_type.with_element_ty = _init_block_type, _with_element_ty
    core.block_type.to_ir = lambda self, builder: self
    core.tensor.__init__ = _init_tensor
    TritonSemantic.broadcast_impl_value = _broadcast(TritonSemantic.broadcast_impl_value)


def _patch_once(patch):
    """Triton's language becomes the interpreter's with the first kernel, and stays so: it is not looked through again
    for every launch and every function that a kernel calls."""
    everything = types.FunctionType((lambda: None).__code__, {"tl": language, "core": core})
    patch_all = functools.cache(lambda: patch(everything))

    def patch_if_needed(fn):
        patch_all()
        return types.SimpleNamespace(restore=lambda: None)

    return patch_if_needed


def _numpy_types(find):
    known = {}

    def numpy_type(of):
        scalar = of.scalar
        if scalar.is_ptr():
            return np.dtype(np.uint64)
        if scalar.name not in known:
            known[scalar.name] = find(scalar)
        return known[scalar.name]

    return numpy_type


class _Shape:
    """What types and tensors say of a shape."""

    def __init__(self, *sides):
        self.of_types, self.of_tensors = core.tuple(sides), core.tuple([core.constexpr(side) for side in sides])
        self.count, self.text = core.constexpr(core.validate_block_shape(sides)), str(self.of_types)


_shape = functools.cache(_Shape)


def _init_block_type(self, element_ty, shape):
    sides = getattr(shape, "values", shape)
    if not all(type(side) is int for side in sides):
        sides = [core._unwrap_if_constexpr(side) for side in core._unwrap_if_constexpr(shape)]
    if not sides:
        raise TypeError("0d block_type is forbidden")
    _describe(self, element_ty, _shape(*sides))


def _with_element_ty(self, scalar_ty):
    of = core.block_type.__new__(core.block_type)
    _describe(of, scalar_ty, self.known)
    return of


def _describe(block_type, element_ty, known):
    block_type.element_ty, block_type.known = element_ty, known
    block_type.shape, block_type.numel = known.of_types, known.count.value
    block_type.name = f"<{known.text}, {element_ty}>"


def _init_tensor(self, handle, type):
    known = type.known if type.is_block() else _shape()
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = known.of_tensors, known.count


def _broadcast(broadcast):
    def broadcast_if_needed(self, lhs, rhs):
        same = lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape is rhs.type.shape
        return (lhs, rhs) if same else broadcast(self, lhs, rhs)

    return broadcast_if_needed
