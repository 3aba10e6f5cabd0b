"""Calls of caches with the names that inputs have in tests."""

import drifting
import torch
from torch import Tensor

from dma_kernels import DynamicMaskCache, NewKeys, Packing
from dma_kernels.decoding.full_cache import FullCache
from dma_kernels.fixed_point import drift_sums, drifted_ranks
from dma_kernels.units import UNIT

Cache = DynamicMaskCache | FullCache
FAR = 10_000_000 * 8 << 32  # units of a drift of 8 nats at each of ten million positions


def with_drift(inputs: dict[str, Tensor], kind: str, start: int = 0) -> dict[str, Tensor]:
    """Inputs with a drift that begins at a given sum: integer ranks, and float64 biases of keys and queries."""
    shape, device = inputs["ranks"].shape, inputs["ranks"].device
    content, steps = (x.to(device) for x in drifting.draw(kind, shape, torch.float64))
    drift = drift_sums(steps, torch.full(shape[:2], start, device=device))
    nats = drift.double() * UNIT
    biases = {"scores": content.sin() + nats, "query_bias": -nats}
    return inputs | {"ranks": drifted_ranks(content, drift), **biases}


def arrivals(
    k: Tensor,
    v: Tensor,
    scores: Tensor,
    ranks: Tensor,
    documents: Tensor | None = None,
    padding: Tensor | None = None,
    query_bias: Tensor | None = None,
) -> NewKeys:
    """New keys, with their packing checked."""
    return NewKeys(k, v, scores, ranks, Packing.of(documents, padding), query_bias)


def attend(cache: Cache, q: Tensor, **new: Tensor | None) -> Tensor:
    """Call a cache's `attend`."""
    return cache.attend(q, arrivals(**new))


def verify(cache: DynamicMaskCache, q: Tensor, **new: Tensor | None) -> Tensor:
    """Call a cache's `verify`."""
    return cache.verify(q, arrivals(**new))
