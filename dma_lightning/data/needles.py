"""Needles in a haystack of tokens: recall the value that came with a key, wherever it was.

    BOS fillers … KEY a1 … aK VAL b1 … bM END … fillers ASK a1 … aK VAL b1 … b(M-1)      labels: b1 … bM

The labels are one answer: b1 under the last VAL, and each further token under the previous one.

L tokens of an example, padded to N sequence length, K tokens of a key, M tokens of a value.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from dma_lightning.data.base import IGNORE_INDEX, Sequences
from dma_lightning.data.drawn import DrawnDataModule, DrawnExamples, Shape, padded, seeded

PAD, BOS, KEY, VAL, ASK, END = range(6)
Haystack = Literal["fillers", "needles"]

DEPTHS = range(0, 101, 10)
"""Depths of validation and test examples, in percent."""


class HaystackTask(Protocol):
    """Draws examples that ask for a needle in a haystack."""

    @property
    def chance(self) -> float:
        """Share of whole answers that a guess among all possible ones gets right."""

    def generate(
        self, seed: int, length: int | None = None, depth: float | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels, int64 `[L]`; the label of a position is the token to predict there, or `IGNORE_INDEX`.

        Args:
            seed: seed for everything that is drawn.
            length: L. Default: drawn.
            depth: where the needle in question stands, from 0 to 100 percent. Default: drawn.
        """


class PaddedShape(Shape, Protocol):
    """Sizes of examples that are padded to one length."""

    @property
    def least_length(self) -> int:
        """Tokens of the shortest example."""

    @property
    def pad_token(self) -> int:
        """Token of the padding."""


class PaddedTask(HaystackTask, PaddedShape, Protocol):
    """Draws examples that are padded to one length."""


@dataclass(frozen=True)
class NeedleTask:
    """The generator of examples.

    Tokens 0 to 5 are PAD, BOS, KEY, VAL, ASK and END. The symbols of keys, of values and of fillers follow.

    Attributes:
        sequence_length: N, maximum number of tokens in an example.
        key_symbols: number of different tokens that keys are made of.
        value_symbols: number of different tokens that values are made of.
        filler_symbols: number of different fillers; each filler is drawn independently.
        key_length: K.
        value_length: M.
        num_needles: number of needles with different keys; the question asks for one of them (multikey).
        values_per_key: number of needles with the key in question; the answer is all their values in order of
            appearance (multivalue).
        haystack: what surrounds the needles: fillers, or as many needles with other keys as fit.

    Raises:
        ValueError: if such an example does not exist.
    """

    sequence_length: int
    key_symbols: int = 64
    value_symbols: int = 64
    filler_symbols: int = 122
    key_length: int = 2
    value_length: int = 4
    num_needles: int = 1
    values_per_key: int = 1
    haystack: Haystack = "fillers"

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "haystack" and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if self.haystack not in get_args(Haystack):
            raise ValueError(f"haystack: expected one of {list(get_args(Haystack))}, got {self.haystack!r}")
        if self.haystack == "needles" and self.num_needles > 1:
            raise ValueError(
                f"num_needles: expected 1 in a haystack of needles, got {self.num_needles}; others already fill it"
            )
        if self.sequence_length < self.least_length:
            raise ValueError(
                f"sequence_length: expected at least {self.least_length} for these needles, got {self.sequence_length}"
            )
        if (different := 1 + self.others(self.sequence_length)) > self.keys:
            raise ValueError(
                f"key_symbols ** key_length: expected a key for each of {different} needles, got {self.keys}; raise one"
            )

    @property
    def vocab_size(self) -> int:
        """V, number of different tokens."""
        return 6 + self.key_symbols + self.value_symbols + self.filler_symbols

    @property
    def pad_token(self) -> int:
        """Token of the padding."""
        return PAD

    @property
    def keys(self) -> int:
        """Number of different keys."""
        return self.key_symbols**self.key_length

    @property
    def needle_length(self) -> int:
        """Tokens of a needle."""
        return self.key_length + self.value_length + 3

    @property
    def answer_length(self) -> int:
        """Tokens of an answer."""
        return self.values_per_key * self.value_length

    @property
    def chance(self) -> float:
        """Share of whole answers that a guess among all values gets right."""
        return self.value_symbols**-self.answer_length

    @property
    def least_length(self) -> int:
        """Tokens of the shortest example, which has no fillers."""
        needles = self.num_needles - 1 + self.values_per_key
        return self.key_length + 2 + self.answer_length + needles * self.needle_length

    def others(self, length: int) -> int:
        """Number of needles with keys other than the one in question, in an example of this many tokens."""
        more = (length - self.least_length) // self.needle_length if self.haystack == "needles" else 0
        return self.num_needles - 1 + more

    def generate(
        self, seed: int, length: int | None = None, depth: float | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw an example, in this order: length, depth, keys, values, fillers, places.

        Args:
            seed: seed for everything that is drawn.
            length: L. Default: drawn, from N / 8 or `least_length`, whichever is more, up to N.
            depth: where the needle in question stands in the haystack, from 0, at the beginning, to 100, just before
                the question (and before other needles at the same place). Of several needles with the key, this is
                the first, or in a haystack of needles any one. Default: drawn.

        Returns:
            Inputs and labels, int64 `[L]`.
        """
        random = seeded(seed)
        if length is None:
            length = random.randint(max(self.least_length, self.sequence_length // 8), self.sequence_length + 1)
        depth = 100 * random.random_sample() if depth is None else depth
        others, asked = self.others(length), self.values_per_key
        fillers = length - self.least_length - (others - self.num_needles + 1) * self.needle_length
        keys = self._keys(random, 1 + others)
        values = 6 + self.key_symbols + random.randint(self.value_symbols, size=(asked + others, self.value_length))
        hay = 6 + self.key_symbols + self.value_symbols + random.randint(self.filler_symbols, size=fillers)

        key = np.concatenate([keys[:1].repeat(asked, axis=0), keys[1:]])
        marks = [np.full((asked + others, 1), mark) for mark in (KEY, VAL, END)]
        needles = np.concatenate([marks[0], key, marks[1], values, marks[2]], axis=1)
        order = self._order(random, asked, others, fillers, depth)
        parts = [*needles, *hay[:, None]]
        answer = np.concatenate([values[i] for i in order if i < asked])
        question = [[ASK], keys[0], [VAL], answer[:-1]]
        inputs = np.concatenate([[BOS], *(parts[i] for i in order), *question]).astype(np.int64)
        labels = np.full_like(inputs, IGNORE_INDEX)
        labels[-len(answer) :] = answer
        return inputs, labels

    def _keys(self, random: np.random.RandomState, count: int) -> np.ndarray:
        """Different keys, tokens `[count, K]`."""
        numbers: dict[int, None] = {}
        while len(numbers) < count:
            numbers[random.randint(self.keys)] = None
        digits = np.array([*numbers])[:, None] // self.key_symbols ** np.arange(self.key_length)
        return 6 + digits % self.key_symbols

    def _order(self, random: np.random.RandomState, asked: int, others: int, fillers: int, depth: float) -> list[int]:
        """Numbers of needles and fillers in order of appearance; number 0 stands at the depth.

        Needles have the first numbers, and fillers those after them. In a haystack of fillers, number 0 is the first
        needle with the key in question.
        """
        needles = asked + others
        if self.haystack == "needles":
            place = np.concatenate([[round(depth / 100 * (needles - 1)) - 0.5], random.permutation(needles - 1)])
            return [*range(needles, needles + fillers), *place.argsort(kind="stable").tolist()]
        place = random.randint(fillers + 1, size=needles)  # how many fillers stand before each
        place[0] = round(depth / 100 * fillers)
        place[1:asked] = place[0] + place[1:asked] * (fillers - place[0]) // max(1, fillers)
        return np.concatenate([place, np.arange(fillers) + 0.5]).argsort(kind="stable").tolist()


def grid_lengths(shape: PaddedShape) -> list[int]:
    """Lengths of validation and test examples: N / 4, N / 2 and N, if such examples exist."""
    return [max(shape.least_length, shape.sequence_length // part) for part in (4, 2, 1)]


class NeedleExamples(DrawnExamples):
    """Examples with padding at their ends.

    Args:
        task: the generator.
        first_seed: seed of example 0.
        count: number of examples.
        grid: whether examples go through lengths (N / 4, N / 2 and N) and depths in turn and report them; otherwise
            both are drawn.
    """

    def __init__(self, task: PaddedTask, first_seed: int, count: int, grid: bool) -> None:
        super().__init__(first_seed, count)
        self.task, self.lengths = task, grid_lengths(task) if grid else None

    def draw(self, index: int) -> dict[str, Tensor]:
        seed = self.first_seed + index
        if self.lengths is None:
            return self._padded(*self.task.generate(seed))
        turn, place = divmod(index, len(DEPTHS))
        length, depth = self.lengths[turn % len(self.lengths)], DEPTHS[place]
        return self._padded(*self.task.generate(seed, length, depth)) | {
            "length": torch.tensor(length),
            "depth": torch.tensor(depth),
        }

    def _padded(self, inputs: np.ndarray, labels: np.ndarray) -> dict[str, Tensor]:
        return padded(inputs, labels, self.task.sequence_length, self.task.pad_token)


class HaystackDataModule(DrawnDataModule, ABC):
    """Needles in haystacks; validation and test go through lengths and depths."""

    needles: PaddedShape
    """The sizes of validation and test examples."""

    @property
    def answer_groups(self) -> dict[str, list[int]]:
        """Lengths and depths of validation and test examples."""
        return {"length": sorted({*grid_lengths(self.needles)}), "depth": [*DEPTHS]}

    @abstractmethod
    def task_at(self, length: int) -> HaystackTask:
        """The generator of validation examples of a length, even beyond `sequence_length`; call it after `setup`.

        Args:
            length: maximum number of tokens in an example, and the length to pass to `generate`.

        Raises:
            ValueError: if there are no such examples.
        """


class NeedleDataModule(HaystackDataModule):
    """Needles in a haystack of tokens, with training, validation and test examples from disjoint seeds.

    Training examples have lengths from an eighth of sequence_length up to all of it, and any depth. Validation and
    test examples go through depths of 0, 10, ... 100 percent, and a quarter, a half and all of the length.

    Args:
        sequence_length: maximum number of tokens in an example; shorter examples are padded.
        key_symbols: number of different tokens that keys are made of.
        value_symbols: number of different tokens that values are made of.
        filler_symbols: number of different fillers.
        key_length: tokens in a key.
        value_length: tokens in a value.
        num_needles: number of needles with different keys; the question asks for one of them (multikey).
        values_per_key: number of needles with the key in question; the question asks for all their values (multivalue).
        haystack: what surrounds the needles: fillers, or as many needles with other keys as fit.
        train_examples: number of training examples.
        val_examples: number of validation examples; every 33 cover each depth at each length once.
        test_examples: number of test examples, also used by `predict`.
        seed: seed of the data set; data sets of equal sizes with different seeds share no examples.
        batch_size: sequences in a batch of each process.
        num_workers: data loading processes per training process.
    """

    needles: NeedleTask

    task_arguments = (
        "sequence_length", "key_symbols", "value_symbols", "filler_symbols", "key_length", "value_length",
        "num_needles", "values_per_key", "haystack",
    )  # fmt: skip

    def __init__(
        self,
        sequence_length: int = 1024,
        key_symbols: int = 64,
        value_symbols: int = 64,
        filler_symbols: int = 122,
        key_length: int = 2,
        value_length: int = 4,
        num_needles: int = 1,
        values_per_key: int = 1,
        haystack: Haystack = "fillers",
        train_examples: int = 1_000_000,
        val_examples: int = 990,
        test_examples: int = 990,
        seed: int = 0,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        self.needles = NeedleTask(
            sequence_length, key_symbols, value_symbols, filler_symbols, key_length, value_length, num_needles,
            values_per_key, haystack,
        )  # fmt: skip
        counts = (train_examples, val_examples, test_examples)
        super().__init__(self.needles, counts, seed, batch_size, num_workers)
        self.save_hyperparameters()

    def examples(self, split: int, first_seed: int, count: int) -> Sequences:
        return NeedleExamples(self.needles, first_seed, count, grid=split > 0)

    def task_at(self, length: int) -> HaystackTask:
        return replace(self.needles, sequence_length=length)
