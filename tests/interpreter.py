"""Triton's interpreter without work that changes nothing."""

import functools
import inspect
from types import FunctionType, ModuleType

import triton.language as tl
from triton.runtime import interpreter

_patch_lang = getattr(interpreter, "_patch_lang", None)


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


def patch_once() -> None:
    """Replace the functions of the language once a launch, and not again for each jitted function called in it.

    A Triton without these private names is left as it is: tests of kernels then take twice as long.
    """
    if _patch_lang is not None and hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = _patch_lang_once
