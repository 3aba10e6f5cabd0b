"""README's figures are those of the result files, and its examples run."""

import re
from pathlib import Path
from unittest.mock import patch

import torch

from dma_lightning import MIXERS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_python_examples_run() -> None:
    examples = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(examples) >= 2
    names = {"ranks": torch.randn(2, 4, 500)}
    with patch.dict(MIXERS):
        for example in examples:
            exec(example, names)
    assert names["tokens"].shape == (1, 5)
    assert names["y"].shape == (2, 2048, 512)
    assert names["mask"].death.shape == (2, 4, 500)


def test_files_that_are_named_exist() -> None:
    for path in re.findall(r"(?:configs|benchmarks|dma_lightning|docs|flex|kernels|tests)/[\w./-]*\w", README):
        assert (ROOT / path).exists(), path
