"""Drawn sequences: ranks of many kinds, documents and padding.

B batch, G KV heads, N length.
"""

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # of selections and kernels
_LENGTHS = (1, 2, 3, 5, 16, 17, 31, 63, 64, 65, 100)
_SPECIAL = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 1e-44, -1e-44, 3.4028234e38, -3.4028234e38)


def draw_length(rng: random.Random, longest: int = 100) -> int:
    """A length, often one close to a block size."""
    return min(longest, rng.choice(_LENGTHS) if rng.random() < 0.5 else rng.randint(1, longest))


def draw_window(rng: random.Random, length: int) -> int:
    """A window size, often one close to an edge, or larger than the sequence."""
    return max(1, rng.choice((1, 2, 7, length - 1, length, length + 5, rng.randint(1, length + 5))))


def generator(rng: random.Random) -> torch.Generator:
    """Torch's random generator for a case."""
    return torch.Generator().manual_seed(rng.getrandbits(32))


def draw_ranks(rng: random.Random, shape: tuple[int, int, int]) -> Tensor:
    """Ranks `[B, G, N]` in float64: distinct, tied, sorted, special, or equal in the bits that are compared."""
    kind, length, source = rng.choice(("normal", "ties", "equal", "sorted", "special", "close", "wide")), shape[-1], 0
    source = generator(rng)
    normal = torch.randn(shape, generator=source, dtype=torch.float64)
    if kind == "ties":
        return normal.mul(rng.choice((0.5, 1, 3))).round()
    if kind == "equal":
        return torch.full(shape, rng.choice((0.0, 1.0, -2.5)), dtype=torch.float64)
    if kind == "sorted":
        return torch.arange(length, dtype=torch.float64).expand(shape) * rng.choice((1, -1)) + normal * rng.choice(
            (0, 2)
        )
    if kind == "special":
        index = torch.randint(len(_SPECIAL), shape, generator=source)
        return torch.tensor(_SPECIAL, dtype=torch.float64)[index]
    if kind == "close":
        return 1 + torch.randint(0, 1 << 10, shape, generator=source).double() * 2.0**-23
    return normal * 10.0 ** (rng.choice((-44, -30, 30, 38)) if kind == "wide" else 0)


@dataclass(frozen=True)
class Packing:
    """Documents and padding of some sequences, or none: as tensors, and as lists for the oracles."""

    documents: Tensor | None
    padding: Tensor | None

    @classmethod
    def drawn(cls, rng: random.Random, batch: int, length: int) -> "Packing":
        documents = padding = None
        if rng.random() < 0.5:
            padding = torch.tensor([_padding(rng, length) for _ in range(batch)])
        if rng.random() < 0.5:
            documents = torch.tensor([_documents(rng, length) for _ in range(batch)])
            documents = documents.to(rng.choice((torch.int64, torch.int64, torch.int32)))
        if documents is not None and padding is not None:  # ids at padded positions have no meaning
            noise = torch.randint(-3, 9, documents.shape, generator=generator(rng), dtype=documents.dtype)
            documents = torch.where(padding, noise, documents)
        return cls(documents, padding)

    def row(self, b: int) -> tuple[list[int] | None, list[bool] | None]:
        """Documents and padding of one sequence."""
        documents, padding = (None if x is None else x[b].tolist() for x in (self.documents, self.padding))
        return documents, padding

    def arguments(self, device: torch.device | None = None) -> dict[str, Tensor | None]:
        """Keyword arguments for making a mask, by default on the CPU."""
        return {name: None if x is None else x.to(device) for name, x in vars(self).items()}

    def __str__(self) -> str:
        return f"documents {self.documents is not None}, padding {self.padding is not None}"


def _documents(rng: random.Random, length: int) -> list[int]:
    change, ids = rng.choice((0.02, 0.1, 0.5)), [rng.randint(-2, 5)]
    while len(ids) < length:
        ids.append(rng.randint(-2, 5) if rng.random() < change else ids[-1])
    return ids


def _padding(rng: random.Random, length: int) -> list[bool]:
    kind, amount, share = rng.choice(("left", "right", "between", "none", "all")), rng.randint(0, length), rng.random()
    return {
        "left": [t < amount for t in range(length)],
        "right": [t >= amount for t in range(length)],
        "between": [rng.random() < share for _ in range(length)],
        "none": [False] * length,
        "all": [True] * length,
    }[kind]
