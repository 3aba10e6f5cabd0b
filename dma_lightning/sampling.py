"""Chooses the next token from logits.

B batch, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token; the default is the likeliest one.

    Filters apply in the order of the fields, as in Hugging Face Transformers.

    Raises:
        ValueError: if a value is out of range.
    """

    repetition_penalty: float = 1.0
    """Divides positive logits of tokens that occurred before, and multiplies negative ones (arXiv 1909.05858)."""
    temperature: float = 0.0
    """Divides logits before tokens are drawn; 0 takes the likeliest token."""
    top_k: int | None = None
    """Draw from the k likeliest tokens; this and the following options need a temperature."""
    top_p: float | None = None
    """Draw from the likeliest tokens that together reach this probability (arXiv 1904.09751)."""
    min_p: float | None = None
    """Draw from tokens with at least this share of the likeliest token's probability (arXiv 2407.01082)."""

    def __post_init__(self) -> None:
        if not (0 < self.repetition_penalty < math.inf and 0 <= self.temperature < math.inf):
            raise ValueError(
                "expected finite repetition_penalty > 0 and temperature >= 0, "
                f"got {self.repetition_penalty} and {self.temperature}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: expected at least 1, got {self.top_k}")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name}: expected 0 < {name} <= 1, got {value}")
        filters = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
        if filters and self.temperature == 0:
            raise ValueError(
                f"temperature: expected more than 0 with {' and '.join(filters)}, got 0, which always takes the "
                "likeliest token; set it, such as to 1"
            )

    def filtered(self, logits: Tensor, occurred: Tensor) -> Tensor:
        """Logits to draw tokens from, float32 `[B, V]`; -inf for tokens that are filtered out.

        Args:
            logits: `[B, V]`.
            occurred: tokens of the text so far, bool `[B, V]`.
        """
        logits = logits.float()
        if self.repetition_penalty != 1:
            penalty = self.repetition_penalty
            penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(occurred, penalized, logits)
        if self.temperature == 0:
            return logits
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature  # the largest is 0: no overflow
        if self.top_k is not None:
            least = logits.topk(min(self.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            falling, token = logits.sort(dim=-1, descending=True, stable=True)
            probability = falling.softmax(-1)
            before = probability.cumsum(-1) - probability  # of all likelier tokens
            logits = logits.masked_fill((before >= self.top_p).gather(-1, token.argsort(-1)), -torch.inf)
        if self.min_p is not None:
            probability = logits.softmax(-1)
            unlikely = probability < self.min_p * probability.amax(-1, keepdim=True)
            logits = logits.masked_fill(unlikely, -torch.inf)
        return logits

    def choose(self, logits: Tensor, occurred: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The next token of each sequence, int64 `[B]`; arguments as in `filtered`."""
        logits = self.filtered(logits, occurred)
        if self.temperature == 0:
            return logits.argmax(-1)
        return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
