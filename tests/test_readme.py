"""Examples in README and docs run, and everything that they name exists."""

import os
import re
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from dma_lightning import MIXERS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs").glob("*.ipynb"))]
EXAMPLES = {  # shapes that the examples of a page leave behind; other pages have tests of their own
    "README.md": {"y": (2, 2048, 512), "out": (2, 8, 1000, 64)},
    "docs/own-model.md": {"y": (2, 2048, 512), "tokens": (1, 5), "out": (2, 8, 1000, 64), "packed": (2, 1, 1000, 1000)},
    "docs/generation.md": {"tokens": (2, 20)},
}

# What torchrun sets for the only process.
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def test_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 180


@pytest.mark.parametrize("page", EXAMPLES)
def test_python_examples_run(page: str) -> None:
    examples = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    names = {"ranks": torch.randn(2, 4, 500)}
    with patch.dict(MIXERS), patch.dict(os.environ, ALONE):
        for example in examples:
            exec(example, names)
    assert {name: tuple(names[name].shape) for name in EXAMPLES[page]} == EXAMPLES[page]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text().replace("STUDY", "first")
    folders = "configs|benchmarks|dma_lightning|docs|flex|kernels|tests"
    for path in re.findall(rf"(?<![\w./-])(?:{folders})/[\w./-]*\w", text):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\(((?!http)[^)#]+)", text):
        assert (page.parent / link).exists(), link
