"""Sizes of the models in configs/model, computed, not measured."""

from dma_lightning.cli.sizes import size_lines
from harness import CONFIGS

NAMES = ("1m", "5m", "20m", "80m", "200m", "680m", "1.7b")
RESULTS = ()


def tables() -> list[str]:
    """A table for each model, for sequences of 4,096 tokens."""
    return ["\n".join(size_lines(CONFIGS / "model" / f"{name}.yaml", 4096)) for name in NAMES]
