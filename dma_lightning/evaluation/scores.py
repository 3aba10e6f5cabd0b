"""Sums over the labels of sequences.

B batch, n positions, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from dma_lightning.data.base import IGNORE_INDEX
from dma_lightning.losses import token_losses


@dataclass(frozen=True, eq=False)  # comparing tensors gives no single truth value
class Scores:
    """Sums over the labels of each sequence `[B]`, on the CPU.

    Attributes:
        nats: losses, float64.
        labels: number of labels, int64.
        right: number of labels that are the likeliest token at their position, int64.
    """

    nats: Tensor
    labels: Tensor
    right: Tensor

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> Self:
        """The scores of logits `[B, n, V]` for labels `[B, n]`."""
        right = (logits.argmax(-1) == labels).sum(-1)  # no token is IGNORE_INDEX
        nats = token_losses(logits, labels).cpu().double().sum(-1)  # not every device has float64
        return cls(nats, (labels != IGNORE_INDEX).sum(-1).cpu(), right.cpu())

    @classmethod
    def joined(cls, parts: Sequence["Scores"]) -> Self:
        """The scores of all sequences of several parts."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ("nats", "labels", "right")))

    def __add__(self, other: "Scores") -> "Scores":
        """The scores of the same sequences, with the labels of both."""
        return Scores(self.nats + other.nats, self.labels + other.labels, self.right + other.right)

    def __getitem__(self, part: slice | Tensor) -> "Scores":
        """The scores of some sequences: a slice of them, or those where a mask `[B]` is True."""
        return Scores(self.nats[part], self.labels[part], self.right[part])

    @property
    def loss(self) -> float:
        """Mean over labels, in nats; NaN if there are none."""
        return (self.nats.sum() / self.labels.sum()).item()

    @property
    def accuracy(self) -> float:
        """Share of labels that are the likeliest token; NaN if there are none."""
        return (self.right.sum().double() / self.labels.sum()).item()

    @property
    def answers(self) -> float:
        """Share of the sequences with labels in which every label is the likeliest token."""
        answers = self.labels > 0
        return ((self.right == self.labels) & answers).sum().double().div(answers.sum()).item()
