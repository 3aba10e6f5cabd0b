"""Imports point downwards only, and importing stays light."""

import ast
import os
import subprocess
import sys
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


def test_no_top_level_package_is_called_kernels_or_flex() -> None:
    assert not (ROOT / "kernels/__init__.py").exists()
    assert not (ROOT / "flex/__init__.py").exists()
