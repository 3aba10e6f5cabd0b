"""What a mean loss means: bits per byte, which compares models of bytes and of tokens, and perplexity."""

import math

from torch import Tensor
from torchmetrics import MeanMetric


def bits_per_byte(loss: Tensor, bytes_per_token: float) -> Tensor:
    """Convert a mean loss in nats per token."""
    return loss / (math.log(2) * bytes_per_token)


class LossPerplexity(MeanMetric):
    """Exponential of the mean of token losses in nats; infinite only if the mean is (or is above 88, in float32).

    (torchmetrics' `Perplexity` is infinite as soon as one token's probability is below the smallest float.)
    """

    def compute(self) -> Tensor:
        return super().compute().exp()


class BitsPerByte(MeanMetric):
    """Mean of token losses in nats, in bits per byte of text."""

    def __init__(self, bytes_per_token: float) -> None:
        super().__init__()
        self.bytes_per_token = bytes_per_token

    def compute(self) -> Tensor:
        return bits_per_byte(super().compute(), self.bytes_per_token)
