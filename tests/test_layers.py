"""Imports only go from higher layers to lower ones, and importing stays light."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "dma_lightning": ROOT / "dma_lightning",
    "dma_flex": ROOT / "flex/dma_flex",
    "dma_kernels": ROOT / "kernels/dma_kernels",
}
ABOVE = {"dma_lightning": set(), "dma_flex": {"dma_lightning"}, "dma_kernels": {"dma_lightning", "dma_flex"}}


def imported_packages(file: Path) -> set[str]:
    """Top-level names that a file imports anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_downwards(package: str) -> None:
    files = list(PACKAGES[package].rglob("*.py"))
    assert files
    for file in files:
        assert not imported_packages(file) & ABOVE[package], file


def modules() -> dict[str, Path]:
    """Every module by its name."""
    files = {file: file.relative_to(root.parent) for root in PACKAGES.values() for file in root.rglob("*.py")}
    return {".".join(x.with_suffix("").parts).removesuffix(".__init__"): file for file, x in files.items()}


def imports(file: Path, known: set[str]) -> Iterator[str]:
    """Our own modules that a file imports, including imports in functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: imports are absolute"
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & known
            yield from inner or {node.module} & known


def room(module: str) -> str:
    """The folder of a module in its package, or the module itself if it is in no folder."""
    return ".".join(module.split(".")[:2])


def test_modules_import_each_other_in_no_circle() -> None:
    files = modules()
    graph = {name: set(imports(file, files.keys())) for name, file in files.items()}
    assert graph["dma_lightning.model"] >= {"dma_lightning.config", "dma_lightning.mixers"}  # it sees something
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle
    assert order.index("dma_kernels.lifetime_masks") < order.index("dma_lightning.mixers.dynamic_mask")


def test_rooms_import_each_other_in_no_circle() -> None:
    files = modules()
    graph: dict[str, set[str]] = {}
    for name, file in files.items():
        if name not in PACKAGES:  # which offer what is in all of their rooms
            graph.setdefault(room(name), set()).update(map(room, imports(file, files.keys() - PACKAGES.keys())))
    list(TopologicalSorter({name: below - {name} for name, below in graph.items()}).static_order())


def run_python(code: str) -> None:
    """Run code in a fresh interpreter that sees no GPU."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["dma_kernels", "dma_flex"])
def test_lower_layers_import_neither_lightning_nor_triton(package: str) -> None:
    heavy = {"lightning", "pytorch_lightning", "triton", "matplotlib", "torchmetrics"}
    run_python(f"import sys, {package}; loaded = {heavy} & set(sys.modules); assert not loaded, loaded")


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_without_triton(package: str) -> None:
    run_python(f"import sys; sys.modules['triton'] = None; import {package}")


@pytest.mark.parametrize(
    ("package", "old", "new"),
    [
        ("dma_kernels", "SegmentLayout", "SegmentSlots"),
        ("dma_kernels", "key_scores", "rank_bias"),
        ("dma_flex", "SegmentPlan", "FlexPlan"),
    ],
)
def test_an_old_name_gives_what_has_a_new_one_and_says_so_once(package: str, old: str, new: str) -> None:
    run_python(
        f"""
import warnings
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    import {package}
    from {package} import *
    assert not told, told
    from {package} import {old}
    assert {old} is {package}.{old} is {package}.{new}
assert [str(x.message) for x in told] == ["{package}.{old} is called {new} now"], told
assert told[0].category is FutureWarning and told[0].filename == "<string>", told[0]
assert not hasattr({package}, "Nothing")
"""
    )


def test_no_top_level_package_is_called_kernels_or_flex() -> None:
    assert not (ROOT / "kernels/__init__.py").exists()
    assert not (ROOT / "flex/__init__.py").exists()
