"""Selections for tests: every combination of documents, padding, kept positions and sinks; and a sequential oracle."""

import heapq
from dataclasses import dataclass

import torch
from torch import Tensor

LENGTHS = [1, 63, 111, 257]


def windows(length: int) -> list[int]:
    """Window sizes around every edge case of a sequence."""
    return sorted({w for w in (1, 7, length - 1, length, length + 5) if w >= 1})


@dataclass(frozen=True)
class Case:
    """The documents, padding and protected keys of a selection."""

    documents: bool = False
    padding: str = "none"
    keep_last: int = 0
    sinks: int = 0

    def arguments(self, batch: int, length: int) -> dict[str, Tensor | int | None]:
        """Keyword arguments of a selection over `[batch, length]`."""
        return {
            "documents": make_documents(batch, length) if self.documents else None,
            "padding": make_padding(self.padding, batch, length),
            "keep_last": self.keep_last,
            "sinks": self.sinks,
        }

    def __str__(self) -> str:
        return f"documents={self.documents},padding={self.padding},last={self.keep_last},sinks={self.sinks}"


CASES = [
    Case(),
    Case(keep_last=3),
    Case(sinks=2),
    Case(documents=True),
    Case(padding="left"),
    Case(padding="right"),
    Case(padding="between"),
    Case(documents=True, padding="between", keep_last=2, sinks=3),
    Case(documents=True, padding="left", sinks=1),
]


def make_documents(batch: int, length: int) -> Tensor:
    """Document ids in runs. Ids occur again in later runs."""
    starts = torch.rand(batch, length) < 0.05
    return starts.long().cumsum(-1) % 3


def make_padding(kind: str, batch: int, length: int) -> Tensor | None:
    """Padding, with a different amount in every row. The last row of `between` is all padding."""
    position, amount = torch.arange(length), torch.randint(0, length, (batch, 1))
    if kind == "none":
        return None
    if kind == "left":
        return position < amount
    if kind == "right":
        return position >= length - amount
    padding = torch.rand(batch, length) < 0.3
    padding[-1] = True
    return padding


def heap_mask(
    priority: list[int],
    window: int,
    documents: list[int] | None,
    padding: list[bool] | None,
    keep_last: int,
    sinks: int,
) -> Tensor:
    """The sequential oracle: one head's dynamic mask `[N, N]`, computed key by key with a heap."""
    length = len(priority)
    mask = torch.zeros(length, length, dtype=torch.bool)
    heap: list[tuple[int, int]] = []
    start, current, real_keys = 0, None, 0
    first_keys: list[int] = []
    for t in range(length):
        real = padding is None or not padding[t]
        if real and documents is not None and current is not None and documents[t] != current:
            heap, start, real_keys, first_keys = [], t, 0, []
        if real:
            current = documents[t] if documents is not None else 0
            real_keys += 1
            if real_keys <= sinks:
                first_keys.append(t)
        entrant = t - keep_last  # no longer among the last positions
        if entrant >= start and (padding is None or not padding[entrant]):
            heapq.heappush(heap, (priority[entrant], entrant))
            if len(heap) > window:
                heapq.heappop(heap)
        last = [j for j in range(max(start, t - keep_last + 1), t + 1) if padding is None or not padding[j]]
        for j in [*(key for _, key in heap), *first_keys, *last]:
            mask[t, j] = True
    return mask
