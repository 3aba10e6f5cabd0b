"""Whether a model finds a needle, by haystack length and needle depth.

B batch, L tokens of an example, M tokens of an answer.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dma_lightning.data.base import IGNORE_INDEX
from dma_lightning.data.drawn import SPLIT_STRIDE
from dma_lightning.data.needles import DEPTHS, HaystackTask
from dma_lightning.evaluation.costs import Cost
from dma_lightning.evaluation.reading import Reader
from dma_lightning.evaluation.scores import Scores

_TEST = 2  # number of the split whose seeds draw the examples
_MOST_EXAMPLES = 1 << 20  # in a cell


@dataclass(frozen=True)
class NeedleGrid:
    """The examples to ask at each length.

    Attributes:
        depths: where the needle stands, from 0 to 100 percent.
        examples: number of examples of each length and depth.
        batch_size: number of examples to read at once.

    Raises:
        ValueError: if a depth or number is out of range.
    """

    depths: Sequence[float] = tuple(DEPTHS)
    examples: int = 100
    batch_size: int = 16

    def __post_init__(self) -> None:
        if not self.depths or not all(0 <= depth <= 100 for depth in self.depths):
            raise ValueError(f"depths: expected at least one, each from 0 to 100 percent, got {list(self.depths)}")
        if not 1 <= self.examples <= _MOST_EXAMPLES:
            raise ValueError(f"examples: expected 1 to {_MOST_EXAMPLES} per cell, got {self.examples}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {self.batch_size}")


@dataclass(frozen=True)
class Cell:
    """Results for the examples of one length and depth.

    Attributes:
        length: L.
        depth: depth in percent.
        first_seed: seed of example 0; each further example has the next seed.
        examples: number of examples.
        answers: share of whole answers that are right.
        accuracy: share of answer tokens that are right, given the true tokens before them.
        loss: mean over answer tokens, in nats.
    """

    length: int
    depth: float
    first_seed: int
    examples: int
    answers: float
    accuracy: float
    loss: float


@dataclass(frozen=True)
class NeedleRow:
    """The cells of one length, and the cost of a batch of that length.

    Attributes:
        length: L.
        chance: share of whole answers that a guess among all possible ones gets right.
        cells: one cell for each depth.
        cost: cost of reading a prompt and answering.
    """

    length: int
    chance: float
    cells: tuple[Cell, ...]
    cost: Cost

    def figures(self) -> dict[str, Any]:
        """Means over depths, and the cost, for a file."""
        return {"length": self.length, "chance": self.chance} | means(self.cells) | asdict(self.cost)


def cell_seed(length: int, depth: float) -> int:
    """Seed of the first example of a cell, from the test split, which training and validation do not use."""
    digest = hashlib.sha256(f"{length} {float(depth)!r}".encode()).digest()
    return _TEST * SPLIT_STRIDE + int.from_bytes(digest[:8], "big") % (SPLIT_STRIDE - _MOST_EXAMPLES)


def needle_cells(reader: Reader, task: HaystackTask, length: int, grid: NeedleGrid) -> NeedleRow:
    """Ask for needles in haystacks of one length.

    An example does not depend on the other cells, nor on how many examples are read at once.

    Args:
        reader: reads the examples.
        task: draws examples of this length.
        length: L.
        grid: depths and number of examples.
    """
    drawn = [(cell_seed(length, depth) + i, depth) for depth in grid.depths for i in range(grid.examples)]
    parts, cost = [], None
    with reader.inferring():
        for start in range(0, len(drawn), grid.batch_size):
            inputs, labels = _examples(task, length, drawn[start : start + grid.batch_size])
            parts.append(answer_scores(reader, inputs, labels))
            if cost is None:
                prompt = inputs[:, : inputs.shape[1] - _answer_length(labels) + 1]
                cost = Cost.measured(reader, prompt.to(reader.device))
    assert cost is not None  # set with the first batch
    scores = Scores.joined(parts)
    cells = []
    for number, depth in enumerate(grid.depths):
        own = scores[slice(number * grid.examples, (number + 1) * grid.examples)]
        seed = cell_seed(length, depth)
        cells.append(Cell(length, float(depth), seed, grid.examples, own.answers, own.accuracy, own.loss))
    return NeedleRow(length, task.chance, tuple(cells), cost)


def answer_scores(reader: Reader, inputs: Tensor, labels: Tensor) -> Scores:
    """Scores of the answers at the end of examples `[B, L]`, fed token by token, within `inferring`.

    All tokens of an answer are the likeliest, given the true tokens before them, if and only if greedy decoding gives
    that answer.
    """
    answer = _answer_length(labels)
    tokens, labels = inputs.to(reader.device), labels[:, labels.shape[1] - answer :].to(reader.device)
    prompt = tokens.shape[1] - answer + 1
    cache, logits = reader.prompt(tokens[:, :prompt])
    steps = [logits]
    for position in range(prompt, tokens.shape[1]):
        steps.append(reader.step(tokens[:, position], cache))
    return Scores.of(torch.stack(steps, dim=1), labels)  # [B, M, V] and [B, M]


def means(cells: Sequence[Cell]) -> dict[str, float | None]:
    """Means over cells, which all have the same number of examples; None if there are no cells."""
    names = ("answers", "accuracy", "loss")
    return {name: sum(getattr(cell, name) for cell in cells) / len(cells) if cells else None for name in names}


def _answer_length(labels: Tensor) -> int:
    """M, the length of the longest answer in a batch."""
    return int((labels != IGNORE_INDEX).sum(-1).max())


def _examples(task: HaystackTask, length: int, drawn: Sequence[tuple[int, float]]) -> tuple[Tensor, Tensor]:
    """Inputs and labels `[B, L]` of the examples with these seeds and depths."""
    pairs = [task.generate(seed, length, depth) for seed, depth in drawn]
    inputs, labels = (torch.from_numpy(np.stack(rows)) for rows in zip(*pairs, strict=True))
    return inputs, labels
