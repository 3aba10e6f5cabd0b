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

import torch
from torch import Tensor
from torch.utils._triton import has_triton

from dma_flex import flex_segment_attention
from dma_kernels import Lifetimes, fused_attention, reference_attention, reference_mask, segment_attention
from dma_kernels.fused_attention import KERNEL_DTYPES, MAX_HEAD_DIM

logger = logging.getLogger(__name__)

Backend = Literal["auto", "triton", "flex", "torch", "reference"]

# Major compute capabilities of the GPUs on which the tests of the Triton kernels have passed; `auto` takes no others.
_TRITON_FAMILIES = {9}


@dataclass(frozen=True)
class Selection:
    """Which keys a query keeps; the arguments of `Lifetimes.top_w`."""

    keep_window_size: int
    keep_last: int = 0
    sinks: int = 0
    documents: Tensor | None = None
    padding: Tensor | None = None

    def arguments(self) -> dict[str, Tensor | int | None]:
        """Keyword arguments of `Lifetimes.top_w`; spelled out, since torch 2.11 cannot compile `vars` of this."""
        return {
            "keep_window_size": self.keep_window_size,
            "keep_last": self.keep_last,
            "sinks": self.sinks,
            "documents": self.documents,
            "padding": self.padding,
        }


AttentionBackend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Selection], Tensor]


def check_backend(name: str) -> None:
    """Raise `ValueError` for an unknown backend."""
    if name not in get_args(Backend):
        raise ValueError(f"backend: expected one of {list(get_args(Backend))}, got {name!r}")


@torch.compiler.assume_constant_result
def resolve_backend(name: str, device: str, index: int | None, dtype: torch.dtype, head_dim: int) -> str:
    """The backend that a name stands for with such tensors: itself, or what `auto` chooses (logged once)."""
    return _auto_backend(device, index, dtype, head_dim) if name == "auto" else name


@cache
def _auto_backend(device: str, index: int | None, dtype: torch.dtype, head_dim: int) -> str:
    chosen = "torch"
    if device == "cuda" and dtype in KERNEL_DTYPES and head_dim <= MAX_HEAD_DIM:
        if torch.cuda.get_device_capability(index)[0] in _TRITON_FAMILIES and has_triton():
            chosen = "triton"
        elif head_dim >= 16:
            chosen = "flex"
    logger.info("backend 'auto': using '%s' for head dim %d in %s on %s", chosen, head_dim, dtype, device)
    return chosen


def _triton_backend(q: Tensor, k: Tensor, v: Tensor, scores: Tensor, ranks: Tensor, selection: Selection) -> Tensor:
    """Triton kernels over segments: trains and infers on CUDA, the same bits in every run."""
    return fused_attention(q, k, v, scores, Lifetimes.top_w(ranks, **selection.arguments()))


def _flex_backend(q: Tensor, k: Tensor, v: Tensor, scores: Tensor, ranks: Tensor, selection: Selection) -> Tensor:
    """FlexAttention over segments, compiled: trains on CUDA, infers on CPU too."""
    return flex_segment_attention(q, k, v, scores, Lifetimes.top_w(ranks, **selection.arguments()))


def _torch_backend(q: Tensor, k: Tensor, v: Tensor, scores: Tensor, ranks: Tensor, selection: Selection) -> Tensor:
    """Dense matmuls per segment: linear in N, any device, trains anywhere."""
    return segment_attention(q, k, v, scores, Lifetimes.top_w(ranks, **selection.arguments()))


def _reference_backend(q: Tensor, k: Tensor, v: Tensor, scores: Tensor, ranks: Tensor, selection: Selection) -> Tensor:
    """The O(N²) definition, for tests."""
    return reference_attention(q, k, v, scores, reference_mask(ranks, **selection.arguments()))


BACKENDS: dict[str, AttentionBackend] = {
    "triton": _triton_backend,
    "flex": _flex_backend,
    "torch": _torch_backend,
    "reference": _reference_backend,
}
