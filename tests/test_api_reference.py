"""The API reference has every public name."""

import re
from importlib import import_module
from pathlib import Path

import pytest

PAGES = Path(__file__).parents[1] / "docs/api"
MODULES = ("", ".callbacks", ".checkpoints", ".monitoring", ".transformers")


def names(page: str) -> dict[str, set[str]]:
    """Names that a page documents, by module."""
    found: dict[str, set[str]] = {}
    module = ""
    for kind, name in re.findall(r"^\.\. (\w+|py:data):: ([\w.]+)$", (PAGES / f"{page}.md").read_text(), re.MULTILINE):
        if kind == "currentmodule":
            module = name
        else:
            found.setdefault(module, set()).add(name)
    return found


@pytest.mark.parametrize(
    "module", [f"dma_lightning{inner}" for inner in MODULES] + ["dma_flex", "dma_kernels", "dma_kernels.context"]
)
def test_all_public_names_are_documented(module: str) -> None:
    public = set(import_module(module).__all__)
    elsewhere = {"Lifetimes"} if module == "dma_flex" else set()  # under dma_kernels
    assert names(module.split(".")[0])[module] == public - elsewhere
