"""The attention backends by name.

A backend takes q, k, v, the keys' scores and ranks, and the selection, and returns the output of dynamic mask
attention. None falls back to another: it runs as asked, or raises.

B batch, H query heads, G KV heads, N length, D head dim.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

from torch import Tensor

from dma_kernels import Lifetimes, reference_attention, reference_mask, segment_attention

logger = logging.getLogger(__name__)

Backend = Literal["auto", "torch", "reference"]


@dataclass(frozen=True)
class Selection:
    """Which keys a query keeps; the arguments of `Lifetimes.top_w`."""

    keep_window_size: int
    keep_last: int = 0
    sinks: int = 0
    documents: Tensor | None = None
    padding: Tensor | None = None


AttentionBackend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Selection], Tensor]


def resolve_backend(name: str) -> str:
    """The backend that a name stands for: itself, or what `auto` chooses (logged once).

    Raises:
        ValueError: for an unknown name.
    """
    if name not in get_args(Backend):
        raise ValueError(f"backend: expected one of {list(get_args(Backend))}, got {name!r}")
    return _auto_backend() if name == "auto" else name


@cache
def _auto_backend() -> str:
    logger.info("backend 'auto': using 'torch'")
    return "torch"


def _torch_backend(q: Tensor, k: Tensor, v: Tensor, scores: Tensor, ranks: Tensor, selection: Selection) -> Tensor:
    """Dense matmuls per segment: linear in N, any device, trains anywhere."""
    return segment_attention(q, k, v, scores, Lifetimes.top_w(ranks, **vars(selection)))


def _reference_backend(q: Tensor, k: Tensor, v: Tensor, scores: Tensor, ranks: Tensor, selection: Selection) -> Tensor:
    """The O(N²) definition, for tests."""
    return reference_attention(q, k, v, scores, reference_mask(ranks, **vars(selection)))


BACKENDS: dict[str, AttentionBackend] = {"torch": _torch_backend, "reference": _reference_backend}
