"""Multi-query associative recall (MQAR): look up values by keys that came earlier.

    k1 v1 k2 v2 … kn vn | fillers … k2 … fillers … k1 … fillers      labels: v2 under k2, v1 under k1, none elsewhere

V vocabulary, N sequence length.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from dma_lightning.data.base import IGNORE_INDEX, Sequences
from dma_lightning.data.drawn import DrawnDataModule, DrawnExamples, padded, seeded


class MQARTask:
    """The generator of examples.

    Args:
        vocab_size: V; keys are drawn from the lower half (without 0), values from the upper.
        sequence_length: N, even.
        num_pairs: n, key-value pairs in an example; each is queried once.
        power: α, exponent of the distribution of the gaps between a pair and its query; 1 is uniform.
        random_fillers: fill the free positions with random tokens instead of 0.

    Raises:
        ValueError: if such an example does not exist.

    Source: "Zoology", arXiv 2312.04927, and its public generator.
    """

    def __init__(
        self, vocab_size: int, sequence_length: int, num_pairs: int, power: float, random_fillers: bool
    ) -> None:
        if sequence_length % 2 or vocab_size <= sequence_length:
            raise ValueError(
                f"expected an even sequence_length below vocab_size, got {sequence_length} and {vocab_size}"
            )
        if num_pairs < 1 or 4 * num_pairs > sequence_length:
            raise ValueError(
                f"num_pairs: expected 1 <= num_pairs <= sequence_length / 4 = {sequence_length // 4}, got {num_pairs}"
            )
        self.vocab_size, self.sequence_length, self.num_pairs = vocab_size, sequence_length, num_pairs
        self.random_fillers = random_fillers
        weights = np.arange(1, (sequence_length - 2 * num_pairs) // 2 + 1) ** (power - 1.0)
        self.slot_probabilities = weights / weights.sum()

    def generate(self, seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw examples in the order of the original generator: all keys, all values, all slots, all fillers.

        Returns:
            Inputs and labels, int64 `[count, N]`; the label stands at the position of the query key.
        """
        random = seeded(seed)  # bit for bit the original's draws
        pairs, length, half = self.num_pairs, self.sequence_length, self.vocab_size // 2
        keys = _draw(random, np.arange(1, half), pairs, count)
        values = _draw(random, np.arange(half, self.vocab_size), pairs, count)
        slots = _draw(random, np.arange(len(self.slot_probabilities)), pairs, count, self.slot_probabilities)

        inputs = np.zeros((count, length), dtype=np.int64)
        labels = np.full((count, length), IGNORE_INDEX, dtype=np.int64)
        inputs[:, 0 : 2 * pairs : 2], inputs[:, 1 : 2 * pairs : 2] = keys, values
        queries = 2 * pairs + 2 * slots
        np.put_along_axis(inputs, queries, keys, axis=1)
        np.put_along_axis(labels, queries, values, axis=1)
        if self.random_fillers:
            free = inputs == 0
            inputs[free] = random.randint(self.vocab_size, size=free.sum())
        return inputs, labels


class MQARMixture(DrawnExamples):
    """Examples of several tasks in turn, the shorter ones padded with 0.

    Args:
        tasks: tasks with one vocabulary.
        sequence_length: N, the padded length of all examples.
        first_seed: seed of example 0.
        count: number of examples.
    """

    def __init__(self, tasks: Sequence[MQARTask], sequence_length: int, first_seed: int, count: int) -> None:
        super().__init__(first_seed, count)
        self.tasks, self.sequence_length = tasks, sequence_length

    def draw(self, index: int) -> dict[str, Tensor]:
        inputs, labels = self.tasks[index % len(self.tasks)].generate(self.first_seed + index, 1)
        return padded(inputs[0], labels[0], self.sequence_length, token=0)


class MQARDataModule(DrawnDataModule):
    """Multi-query associative recall with training, validation and test examples from disjoint seeds.

    A mixture lets training begin with easier examples: training then takes its lengths and numbers of pairs in turn, as
    "Zoology" does. Validation and test always use sequence_length and num_pairs.

    Args:
        vocab_size: number of different tokens; keys come from the lower half, values from the upper.
        sequence_length: tokens in a sequence; even and below vocab_size.
        num_pairs: key-value pairs in an example, at most a quarter of sequence_length.
        power: exponent of the distribution of the gaps between pair and query; 1 is uniform.
        random_fillers: fill free positions with random tokens instead of 0.
        mixture: length and number of pairs of each kind of training example, such as [[64, 4], [256, 64]]. Default:
            sequence_length and num_pairs, as in validation.
        train_examples: number of training examples.
        val_examples: number of validation examples.
        test_examples: number of test examples, also used by `predict`.
        seed: seed of the data set; data sets of equal sizes with different seeds share no examples.
        batch_size: sequences in a batch of each process.
        num_workers: data loading processes per training process.
    """

    task_arguments = ("vocab_size", "sequence_length", "num_pairs", "power", "random_fillers", "mixture")

    def __init__(
        self,
        vocab_size: int = 256,
        sequence_length: int = 64,
        num_pairs: int = 8,
        power: float = 0.01,
        random_fillers: bool = True,
        train_examples: int = 100_000,
        val_examples: int = 1_000,
        test_examples: int = 1_000,
        seed: int = 0,
        batch_size: int = 64,
        num_workers: int = 0,
        mixture: list[list[int]] | None = None,
    ) -> None:
        task = MQARTask(vocab_size, sequence_length, num_pairs, power, random_fillers)
        super().__init__(task, (train_examples, val_examples, test_examples), seed, batch_size, num_workers)
        self.save_hyperparameters()
        if any(len(kind) != 2 or kind[0] > sequence_length for kind in mixture or []):
            raise ValueError(
                f"mixture: expected pairs of a length, at most sequence_length = {sequence_length}, and a number of "
                f"pairs, got {mixture}"
            )
        kinds = mixture or []
        self.mixture = [MQARTask(vocab_size, size, pairs, power, random_fillers) for size, pairs in kinds]

    def examples(self, split: int, first_seed: int, count: int) -> Sequences:
        if split or not self.mixture:
            return super().examples(split, first_seed, count)
        return MQARMixture(self.mixture, self.sequence_length, first_seed, count)


def _draw(
    random: np.random.RandomState, choices: np.ndarray, size: int, count: int, p: np.ndarray | None = None
) -> np.ndarray:
    """`count` rows, each of `size` distinct choices."""
    return np.stack([random.choice(choices, size=size, replace=False, p=p) for _ in range(count)])
