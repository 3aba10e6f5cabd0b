"""Caches that are asked by the names that inputs have in tests."""

from torch import Tensor

from dma_kernels import DynamicMaskCache, NewKeys, Packing
from dma_kernels.decoding.full_cache import FullCache

Cache = DynamicMaskCache | FullCache


def arrivals(
    k: Tensor,
    v: Tensor,
    scores: Tensor,
    ranks: Tensor,
    documents: Tensor | None = None,
    padding: Tensor | None = None,
) -> NewKeys:
    """New keys, packed as they are, or refused."""
    return NewKeys(k, v, scores, ranks, Packing.of(documents, padding))


def attend(cache: Cache, q: Tensor, **new: Tensor | None) -> Tensor:
    """`attend` of a cache."""
    return cache.attend(q, arrivals(**new))


def verify(cache: DynamicMaskCache, q: Tensor, **new: Tensor | None) -> Tensor:
    """`verify` of a cache."""
    return cache.verify(q, arrivals(**new))
