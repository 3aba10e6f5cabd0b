"""Bits per byte, the figure that compares models of bytes and of tokens."""

import math

from torch import Tensor
from torchmetrics import MeanMetric


def bits_per_byte(loss: Tensor, bytes_per_token: float) -> Tensor:
    """Convert a mean loss in nats per token."""
    return loss / (math.log(2) * bytes_per_token)


class BitsPerByte(MeanMetric):
    """Mean of token losses in nats, in bits per byte of text."""

    def __init__(self, bytes_per_token: float) -> None:
        super().__init__()
        self.bytes_per_token = bytes_per_token

    def compute(self) -> Tensor:
        return bits_per_byte(super().compute(), self.bytes_per_token)
