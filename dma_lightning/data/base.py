"""What every data module of token sequences shares.

B batch, N length.
"""

from typing import NotRequired, TypedDict

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

IGNORE_INDEX = -100


class Batch(TypedDict):
    """One batch: what the model reads, and what it must say at each position.

    `input_ids` and `labels` are int64 `[B, N]`; the label of a position is the token to predict there, or
    `IGNORE_INDEX`. `documents` (int64) and `padding` (bool) `[B, N]` are optional.
    """

    input_ids: Tensor
    labels: Tensor
    documents: NotRequired[Tensor]
    padding: NotRequired[Tensor]


class SequenceDataModule(pl.LightningDataModule):
    """Data loaders over datasets of equally long token sequences.

    A subclass sets `train_set`, `val_set` and `test_set` in `setup`.

    Args:
        vocab_size: number of different tokens, passed on to the model.
        sequence_length: tokens in a sequence, passed on to the model.
        batch_size: sequences in a batch of each process.
        num_workers: processes that load data beside each training process.
    """

    train_set: Dataset
    val_set: Dataset
    test_set: Dataset

    @property
    def bytes_per_token(self) -> float | None:
        """Mean length of a token where the data is text, passed on to the model."""
        return None

    def __init__(
        self,
        vocab_size: int,
        sequence_length: int,
        batch_size: int,
        num_workers: int,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("sequence_length", sequence_length, 1),
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        self.vocab_size, self.sequence_length = vocab_size, sequence_length
        self.batch_size, self.num_workers = batch_size, num_workers

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.train_set, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.val_set)

    def test_dataloader(self) -> DataLoader:
        return self._loader(self.test_set)

    def predict_dataloader(self) -> DataLoader:
        return self._loader(self.test_set)

    def _loader(self, dataset: Dataset, shuffle: bool = False) -> DataLoader:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )
