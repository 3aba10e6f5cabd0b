"""Data that is drawn instead of read: examples of a task, each with its own seed.

N sequence length.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dma_lightning.data.base import IGNORE_INDEX, SequenceDataModule, Sequences

SPLIT_STRIDE = 1 << 30  # each split draws its seeds from its own range


_random = np.random.RandomState(0)


def seeded(seed: int) -> np.random.RandomState:
    """NumPy's legacy generator, whose draws never change, reset to a seed.

    Every call returns the same object, so finish one example before you begin the next. A new generator would take
    a hundred microseconds, as long as drawing an example.
    """
    _random.seed(seed)
    return _random


def padded(inputs: np.ndarray, labels: np.ndarray, length: int, token: int) -> dict[str, Tensor]:
    """An example with padding at its end, in the format of `Batch`.

    Args:
        inputs: int64 `[L]`.
        labels: int64 `[L]`.
        length: N, the length with padding.
        token: the token of the padding.
    """
    input_ids, target = torch.full((length,), token), torch.full((length,), IGNORE_INDEX)
    padding = torch.ones(length, dtype=torch.bool)
    input_ids[: len(inputs)], target[: len(labels)] = torch.from_numpy(inputs), torch.from_numpy(labels)
    padding[: len(inputs)] = False
    return {"input_ids": input_ids, "labels": target, "padding": padding}


class Shape(Protocol):
    """Sizes of a task's examples."""

    @property
    def vocab_size(self) -> int:
        """V, number of different tokens."""

    @property
    def sequence_length(self) -> int:
        """N, number of tokens in an example."""


class Task(Shape, Protocol):
    """Draws examples of one length, several at once."""

    def generate(self, seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels, int64 `[count, N]`; a label is the token to predict there, or `IGNORE_INDEX`."""


class DrawnExamples(Dataset, ABC):
    """Answers that are drawn on request, one per seed.

    Args:
        first_seed: seed of example 0.
        count: number of examples.
    """

    def __init__(self, first_seed: int, count: int) -> None:
        self.first_seed, self.count = first_seed, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return {"is_answer": torch.ones((), dtype=torch.bool)} | self.draw(index)

    @abstractmethod
    def draw(self, index: int) -> dict[str, Tensor]:
        """Inputs and labels `[N]` of an example, and other `Batch` keys; `is_answer` is true unless they say not."""


class TaskExamples(DrawnExamples):
    """Examples of a task that all have one length."""

    def __init__(self, task: Task, first_seed: int, count: int) -> None:
        super().__init__(first_seed, count)
        self.task = task

    def draw(self, index: int) -> dict[str, Tensor]:
        inputs, labels = self.task.generate(self.first_seed + index, 1)
        return {"input_ids": torch.from_numpy(inputs[0]), "labels": torch.from_numpy(labels[0])}


class DrawnDataModule(SequenceDataModule):
    """Examples of a task, with training, validation and test examples from disjoint seeds.

    Args:
        task: the generator.
        counts: number of training, validation and test examples.
        seed: seed of the data set; data sets of equal sizes with different seeds share no examples.
        batch_size: sequences in a batch of each process.
        num_workers: data loading processes per training process.

    Raises:
        ValueError: if a split would be empty, or the seeds of two splits would overlap.
    """

    task_arguments: ClassVar[tuple[str, ...]] = ()
    """Arguments that define the examples."""

    def __init__(self, task: Shape, counts: tuple[int, int, int], seed: int, batch_size: int, num_workers: int) -> None:
        super().__init__(task.vocab_size, task.sequence_length, batch_size, num_workers)
        if min(counts) < 1 or seed < 0 or (seed + 1) * max(counts) > SPLIT_STRIDE:
            raise ValueError(
                "expected at least one example in each split, seed >= 0, and (seed + 1) * examples <= 2**30, "
                f"got {counts} examples and seed {seed}"
            )
        self.task, self.counts, self.seed = task, counts, seed

    @classmethod
    def is_complete(cls) -> bool:
        """Whether the class has a task; this one has none."""
        return bool(cls.task_arguments)

    @property
    def fingerprint(self) -> str:
        """Everything that determines the examples, without arguments that are None, which older checkpoints lack."""
        said = {name: self.hparams[name] for name in (*self.task_arguments, "seed")}
        return ", ".join(f"{name} {value}" for name, value in said.items() if value is not None)

    def setup(self, stage: str) -> None:
        self.train_set, self.val_set, self.test_set = (
            self.examples(split, split * SPLIT_STRIDE + self.seed * count, count)
            for split, count in enumerate(self.counts)
        )

    def examples(self, split: int, first_seed: int, count: int) -> Sequences:
        """The training (0), validation (1) or test (2) examples.

        Args:
            split: number of the split.
            first_seed: seed of example 0; each further example has the next seed.
            count: number of examples.
        """
        return TaskExamples(cast("Task", self.task), first_seed, count)  # tasks of other kinds override this
