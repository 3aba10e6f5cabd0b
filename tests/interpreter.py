"""Speed up Triton's interpreter by leaving out work that has no effect on results."""

import functools
import inspect
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import triton.language as tl
from triton.language import semantic
from triton.runtime import interpreter

_patch_lang = getattr(interpreter, "_patch_lang", None)
_get_np_dtype = getattr(interpreter, "_get_np_dtype", None)
_compute_and_check = getattr(semantic.TritonSemantic, "binary_op_sanitize_overflow_impl", None)
_generic_reduce = getattr(getattr(interpreter, "ReduceOps", None), "generic_reduce", None)
_xor = getattr(tl.standard, "_xor_combine", None)


@functools.cache
def _language_of(function: FunctionType) -> tuple[ModuleType, ...]:
    """The modules of Triton's language that a jitted function sees."""
    seen = [x for x in function.__globals__.values() if inspect.ismodule(x)]
    return tuple(x for x in seen if x in (tl, tl.core))


def _patch_lang_once(function: FunctionType) -> "interpreter._LangPatchScope":
    replaced = (x for language in _language_of(function) for x in (language.load, language.tensor.__add__))
    if any(map(tl.core.is_builtin, replaced)):
        return _patch_lang(function)
    return interpreter._LangPatchScope()


@functools.cache
def _dtype_of_scalar(scalar: tl.dtype) -> np.dtype:
    return _get_np_dtype(scalar)


def _dtype(kind: tl.dtype) -> np.dtype:
    """NumPy's dtype of a scalar or block. The interpreter itself would build a table of all dtypes for each look-up."""
    scalar = kind.scalar
    return np.dtype(np.uint64) if isinstance(scalar, tl.pointer_type) else _dtype_of_scalar(scalar)


def _check_overflow(self: semantic.TritonSemantic, *operands: object) -> None:
    """Compute sums, differences and products a second time in int64 only if the check for overflow is on."""
    if self.builder.options.debug:
        _compute_and_check(self, *operands)


def _xor_at_once(self: Any, inputs: tuple[Any, ...]) -> list[Any]:
    """Reduce by xor in one step, not element by element. Sorting consists of such reductions."""
    if self.combine_fn is not _xor or self.axis is None:
        return _generic_reduce(self, inputs)
    x = inputs[0]
    return [self.to_tensor(np.bitwise_xor.reduce(x.handle.data, axis=self.axis, keepdims=self.keep_dims), x.dtype)]


def patch_once() -> None:
    """Replace the functions of the language once per launch, not again for each jitted function that it calls.

    Also install the faster functions above for dtypes, overflow checks and sorts. If a version of Triton lacks these
    private names, it is left unchanged, and tests of kernels take three times as long.
    """
    if _patch_lang is not None and hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = _patch_lang_once
    if _get_np_dtype is not None:
        interpreter._get_np_dtype = _dtype
    if _compute_and_check is not None:
        semantic.TritonSemantic.binary_op_sanitize_overflow_impl = _check_overflow
    if _generic_reduce is not None and _xor is not None:
        interpreter.ReduceOps.generic_reduce = _xor_at_once
