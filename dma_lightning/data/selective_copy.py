"""Selective copy: repeat the few tokens that stood among blanks, in order.

    x1 _ _ x2 _ … _ xM _ _ | ? ? … ?      labels: x1 … xM under the markers, none elsewhere

A vocabulary, M data tokens, N sequence length.
"""

import numpy as np

from dma_lightning.data.base import IGNORE_INDEX
from dma_lightning.data.drawn import DrawnDataModule, seeded

BLANK = 0


class SelectiveCopyTask:
    """The generator of examples: N - M places for M data tokens, blanks between them, then M markers.

    Token 0 is the blank, token A - 1 is the marker, and all tokens between are data.

    Args:
        vocab_size: A, at least 3.
        sequence_length: N, at least 2 M.
        num_tokens: M.
        selective: data tokens stand at random places; otherwise they come first, without blanks between (plain copy).

    Raises:
        ValueError: if such an example does not exist.

    Source: the selective copying task of "Mamba", arXiv 2312.00752, section 4.1.1; plain copying is older.
    """

    def __init__(self, vocab_size: int, sequence_length: int, num_tokens: int, selective: bool) -> None:
        if vocab_size < 3:
            raise ValueError(f"vocab_size: expected at least 3 (blank, data, marker), got {vocab_size}")
        if num_tokens < 1 or 2 * num_tokens > sequence_length:
            most = sequence_length // 2
            raise ValueError(f"num_tokens: expected 1 <= num_tokens <= sequence_length / 2 = {most}, got {num_tokens}")
        self.vocab_size, self.sequence_length = vocab_size, sequence_length
        self.num_tokens, self.selective = num_tokens, selective

    def generate(self, seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw examples: all data tokens, then all places.

        Returns:
            Inputs and labels, int64 `[count, N]`.
        """
        random = seeded(seed)
        copied, places = self.num_tokens, self.sequence_length - self.num_tokens
        data = random.randint(1, self.vocab_size - 1, size=(count, copied))
        place = np.tile(np.arange(copied), (count, 1))
        if self.selective:
            drawn = [random.choice(places, size=copied, replace=False) for _ in range(count)]
            place = np.sort(np.reshape(drawn, (count, copied)), axis=1)

        inputs = np.full((count, self.sequence_length), BLANK, dtype=np.int64)
        labels = np.full((count, self.sequence_length), IGNORE_INDEX, dtype=np.int64)
        np.put_along_axis(inputs, place, data, axis=1)
        inputs[:, places:], labels[:, places:] = self.vocab_size - 1, data
        return inputs, labels


class SelectiveCopyDataModule(DrawnDataModule):
    """Selective copy, or plain copy, with training, validation and test examples from disjoint seeds.

    Which tokens matter does not depend on the query, so this is the best case for a mask of one score per key.

    Args:
        vocab_size: number of different tokens: one blank, one marker, and data.
        sequence_length: tokens in a sequence, the markers included; at least twice num_tokens.
        num_tokens: data tokens to copy.
        selective: data tokens stand at random places among blanks; otherwise they come first (plain copy).
        train_examples: number of training examples.
        val_examples: number of validation examples.
        test_examples: number of test examples, also used by `predict`.
        seed: seed of the data set; data sets of equal sizes with different seeds share no examples.
        batch_size: sequences in a batch of each process.
        num_workers: data loading processes per training process.
    """

    task_arguments = ("vocab_size", "sequence_length", "num_tokens", "selective")

    def __init__(
        self,
        vocab_size: int = 16,
        sequence_length: int = 256,
        num_tokens: int = 16,
        selective: bool = True,
        train_examples: int = 1_000_000,
        val_examples: int = 1_000,
        test_examples: int = 1_000,
        seed: int = 0,
        batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        task = SelectiveCopyTask(vocab_size, sequence_length, num_tokens, selective)
        super().__init__(task, (train_examples, val_examples, test_examples), seed, batch_size, num_workers)
        self.save_hyperparameters()
