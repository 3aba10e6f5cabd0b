"""Figures in README and docs are those of the result files, and the examples run."""

import re
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from readme_figures import SECTION, pages, sections, updated
from size_tables import PAGE
from size_tables import updated as with_sizes

from dma_lightning import MIXERS

ROOT = Path(__file__).parents[1]
PAGES = pages()
EXAMPLES = {  # shapes that the examples of a page leave behind; other pages have tests of their own
    "README.md": {"y": (2, 2048, 512), "out": (2, 8, 1000, 64)},
    "docs/own-model.md": {"y": (2, 2048, 512), "tokens": (1, 5), "out": (2, 8, 1000, 64), "packed": (2, 1, 1000, 1000)},
    "docs/generation.md": {"tokens": (2, 20)},
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_figures_are_those_of_the_result_files(page: Path) -> None:
    assert updated(page) == page.read_text()


def test_every_section_is_in_a_page() -> None:
    marked = {name for page in PAGES for _, name, _ in SECTION.findall(page.read_text())}
    assert marked == {*sections(), "readme_speed"}


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


def test_sizes_are_those_of_the_configs() -> None:
    assert with_sizes(PAGE.read_text()) == PAGE.read_text()


@pytest.mark.parametrize("page", EXAMPLES)
def test_python_examples_run(page: str) -> None:
    examples = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    names = {"ranks": torch.randn(2, 4, 500)}
    with patch.dict(MIXERS):
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
