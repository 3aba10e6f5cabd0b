"""Induction: predict what followed a token when it came before.

    random tokens … T y … random tokens … T      label: y under the last T, none elsewhere

A vocabulary, N sequence length.
"""

import numpy as np

from dma_lightning.data.base import IGNORE_INDEX
from dma_lightning.data.drawn import DrawnDataModule, seeded


class InductionTask:
    """The generator of examples: random tokens, a trigger at a random place, and the trigger again at the end.

    Token A - 1 is the trigger, which stands nowhere else.

    Args:
        vocab_size: A, at least 2.
        sequence_length: N, at least 3.

    Raises:
        ValueError: if such an example does not exist.

    Source: the induction heads task of "Mamba", arXiv 2312.00752, section 4.1.2.
    """

    def __init__(self, vocab_size: int, sequence_length: int) -> None:
        if vocab_size < 2 or sequence_length < 3:
            raise ValueError(
                f"expected vocab_size >= 2 and sequence_length >= 3, got {vocab_size} and {sequence_length}"
            )
        self.vocab_size, self.sequence_length = vocab_size, sequence_length

    def generate(self, seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw examples: all tokens, then all places of the trigger.

        Returns:
            Inputs and labels, int64 `[count, N]`.
        """
        random, trigger = seeded(seed), self.vocab_size - 1
        inputs = random.randint(trigger, size=(count, self.sequence_length)).astype(np.int64)
        place = random.randint(self.sequence_length - 2, size=(count, 1))
        np.put_along_axis(inputs, place, trigger, axis=1)
        inputs[:, -1] = trigger
        labels = np.full_like(inputs, IGNORE_INDEX)
        labels[:, -1:] = np.take_along_axis(inputs, place + 1, axis=1)
        return inputs, labels


class InductionDataModule(DrawnDataModule):
    """Induction, with training, validation and test examples from disjoint seeds.

    Args:
        vocab_size: number of different tokens, the trigger included.
        sequence_length: tokens in a sequence.
        train_examples: number of training examples.
        val_examples: number of validation examples.
        test_examples: number of test examples, also used by `predict`.
        seed: seed of the data set; data sets of equal sizes with different seeds share no examples.
        batch_size: sequences in a batch of each process.
        num_workers: data loading processes per training process.
    """

    task_arguments = ("vocab_size", "sequence_length")

    def __init__(
        self,
        vocab_size: int = 16,
        sequence_length: int = 256,
        train_examples: int = 1_000_000,
        val_examples: int = 1_000,
        test_examples: int = 1_000,
        seed: int = 0,
        batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        task = InductionTask(vocab_size, sequence_length)
        super().__init__(task, (train_examples, val_examples, test_examples), seed, batch_size, num_workers)
        self.save_hyperparameters()
