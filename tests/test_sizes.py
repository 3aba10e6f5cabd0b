"""Functions stay small enough to read at a glance.

They have at most 45 lines, without the docstring, and 8 parameters. Some kinds are exempt: jitted functions, launchers,
custom operations with their plain, fake and registered forms, methods of `autograd.Function`, attention functions that
users call with keyword arguments, and signatures that become command-line flags.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_layers import PACKAGES

MAX_LINES, MAX_PARAMETERS = 45, 8

# Where the arguments of `__init__`, and of functions, are flags.
FLAGS = ("dma_lightning/data/", "dma_lightning/callbacks/", "dma_lightning/monitoring/", "dma_lightning/mixers/")
FLAGS += ("dma_lightning/cli/", "dma_lightning/checkpoints/resumable.py", "dma_lightning/language_model.py")
FLAGS += ("dma_lightning/generation.py",)

COMMANDS = ("generate", "stream_tokens", "prepare", "train_tokenizer", "sizes", "import_hf", "export_hf")
COMMANDS += ("needle", "extrapolation", "positions", "evaluate")

ATTENTIONS = ("fused_attention", "segment_attention", "flex_segment_attention", "attend", "attend_with_far_bias")
ATTENTIONS += ("dynamic_mask_attention",)

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(source: str) -> Iterator[tuple[Function, ast.ClassDef | None]]:
    """Every function, with the class that it is a method of."""
    tree = ast.parse(source)
    owners = {child: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for child in node.body}
    for node in ast.walk(tree):
        if isinstance(node, Function):
            yield node, owners.get(node)


def lines(function: Function) -> int:
    """Lines of a definition, without its decorators and docstring."""
    docstring = function.body[0] if ast.get_docstring(function) else None
    return function.end_lineno - function.lineno + 1 - (docstring.end_lineno - docstring.lineno + 1 if docstring else 0)


def parameters(function: Function) -> int:
    arguments = function.args
    named = len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs)
    return named + (arguments.vararg is not None) + (arguments.kwarg is not None)


def custom_operations(source: str) -> set[str]:
    """Functions that become custom operations, by a decorator or a call."""
    calls = [x for x in ast.walk(ast.parse(source)) if isinstance(x, ast.Call) and "custom_op" in ast.unparse(x.func)]
    named = {
        x.id for call in calls if "custom_op" in ast.unparse(call.func) for x in call.args if isinstance(x, ast.Name)
    }
    decorated = {x.name for x, _ in functions(source) if any("custom_op" in ast.unparse(y) for y in x.decorator_list)}
    return named | decorated


def is_jitted(function: Function) -> bool:
    return any(jit in ast.unparse(x) for x in function.decorator_list for jit in ("triton.jit", "gluon.jit"))


def may_take_many(file: str, source: str, function: Function, owner: ast.ClassDef | None) -> bool:
    """Whether a function may have more parameters because of its kind."""
    decorators = " ".join(ast.unparse(x) for x in function.decorator_list)
    operations = custom_operations(source)
    return (
        function.name.removeprefix("_").startswith("launch")
        or function.name.removesuffix("_reference") in operations
        or function.name in ATTENTIONS
        or any(x in decorators for x in ("register_fake", "register_kernel", "register_launch"))
        or (owner is not None and any("autograd.Function" in ast.unparse(x) for x in owner.bases))
        or (file.startswith(FLAGS) and function.name in ("__init__", *COMMANDS))
    )


def too_large(file: str, source: str) -> list[str]:
    """Definitions in a file that are too large."""
    found = []
    for function, owner in functions(source):
        if is_jitted(function):
            continue
        if lines(function) > MAX_LINES:
            found.append(f"{file}: {function.name} has {lines(function)} lines")
        if parameters(function) > MAX_PARAMETERS and not may_take_many(file, source, function, owner):
            found.append(f"{file}: {function.name} has {parameters(function)} parameters")
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_functions_are_small(package: str) -> None:
    root: Path = PACKAGES[package]
    files = {str(file.relative_to(root.parent)): file.read_text() for file in root.rglob("*.py")}
    assert [x for file, source in files.items() for x in too_large(file, source)] == []


def test_what_is_large_is_found() -> None:
    many, long = ", ".join("abcdefghi"), "\n".join(["    x = 1"] * 46)
    for source in (f"def f({many}): ...", f"def f():\n{long}", f"class C:\n    def __init__(self, {many}): ..."):
        assert too_large("dma_kernels/x.py", source)
    for source in (f"@triton.jit\ndef f({many}): ...", f"def launch_f({many}): ..."):
        assert not too_large("dma_kernels/x.py", source)
    assert not too_large("dma_lightning/data/x.py", f"class C:\n    def __init__(self, {many}): ...")
