"""Time and memory to read a sequence and to continue it.

B batch, N length.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from dma_lightning.evaluation.reading import Reader

STEPS = 9  # decoding steps; the first is not measured


@dataclass(frozen=True)
class Cost:
    """The cost of a batch of sequences of one length.

    Attributes:
        batch_size: sequences that are read at once.
        prompt_seconds_per_token: time to read the sequences, divided by their total number of tokens.
        step_seconds: time of a step that generates a token for each sequence, median of several.
        cache_bytes: memory of one sequence's cache, including room reserved for more tokens.
        peak_memory_bytes: most memory in use, weights included; None on a CPU.
    """

    batch_size: int
    prompt_seconds_per_token: float
    step_seconds: float
    cache_bytes: int
    peak_memory_bytes: int | None

    @classmethod
    def measured(cls, reader: Reader, input_ids: Tensor) -> "Cost":
        """Measure sequences `[B, N]`, within `reader.inferring()`; they are read twice, and only the second counts.

        Args:
            reader: reads the sequences.
            input_ids: the sequences, on the reader's device.
        """
        on_gpu = torch.device(reader.device).type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(reader.device)
        reader.prompt(input_ids)
        start = _now(reader.device)
        cache, logits = reader.prompt(input_ids)
        seconds, size = _now(reader.device) - start, cache_bytes(cache)
        steps = []
        for _ in range(STEPS):
            start = _now(reader.device)
            logits = reader.step(logits.argmax(-1), cache)
            steps.append(_now(reader.device) - start)
        peak = torch.cuda.max_memory_allocated(reader.device) if on_gpu else None
        return cls(len(input_ids), seconds / input_ids.numel(), median(steps[1:]), size // len(input_ids), peak)


def cache_bytes(cache: Any) -> int:
    """Memory of all tensors that a cache holds, directly, in lists or in nested objects."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in _tensors(cache, set())}
    return sum(storages.values())


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """All tensors below a value; each object is visited once, so circular references do no harm."""
    if isinstance(value, Tensor):
        yield value
    elif id(value) not in seen:
        seen.add(id(value))
        if isinstance(value, dict):
            below = list(value.values())
        elif isinstance(value, list | tuple):
            below = list(value)
        else:
            below = list(getattr(value, "__dict__", {}).values())
        for inner in below:
            yield from _tensors(inner, seen)


def _now(device: str) -> float:
    """Time in seconds, once the device has finished its work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
