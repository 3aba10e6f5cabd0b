"""The attention backends by name.

A backend computes attention from q, k, v and the keys' biases over the lifetimes of the keys. No backend falls back to
another: it runs as requested or raises.

B batch, H query heads, G KV heads, N length, D head dim.
"""

import logging
from functools import cache
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.utils._triton import has_triton

from dma_flex import flex_segment_attention
from dma_kernels import (
    KeepRule,
    Lifetimes,
    Packing,
    fused_attention,
    reference_attention,
    reference_mask,
    segment_attention,
)
from dma_kernels.attention.ops import KERNEL_DTYPES, MAX_HEAD_DIM

logger = logging.getLogger(__name__)

Backend = Literal["auto", "triton", "flex", "torch", "reference"]


class Attention(Protocol):
    """The signature of a backend: attention over lifetimes, from q, k, v and key_bias."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, lifetimes: Lifetimes, /, scale: float | None = None,
        *, query_bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """`[B, H, N, D]`; the default scale is `1 / sqrt(D)`.

        Biases are float32 or float64 `[B, G, N]`. A query bias changes no output; its gradient is the sum of dS over
        the keys. If key biases are float64, the query bias of the segment's first query is added before they are
        rounded.
        """


# Major compute capabilities of GPUs on which the tests of the Triton kernels have passed; `auto` uses no others.
_TRITON_FAMILIES = {9}


def check_backend(name: str) -> None:
    """Raise `ValueError` for an unknown backend."""
    if name not in get_args(Backend):
        raise ValueError(f"backend: expected one of {list(get_args(Backend))}, got {name!r}")


@torch.compiler.assume_constant_result
def resolve_backend(
    name: str, device: str, index: int | None, dtype: torch.dtype, head_dim: int, drifts: bool = False
) -> str:
    """The backend to use for such tensors: the named one, or what `auto` chooses (logged once)."""
    return _auto_backend(device, index, dtype, head_dim, drifts)[0] if name == "auto" else name


def explain_backend(
    name: str, device: str, index: int | None, dtype: torch.dtype, head_dim: int, drifts: bool = False
) -> str:
    """The backend that `resolve_backend` returns, and why; text for users."""
    if name != "auto":
        return f"{name}, as asked for"
    return "{}, chosen by auto: {}".format(*_auto_backend(device, index, dtype, head_dim, drifts))


@cache
def _auto_backend(device: str, index: int | None, dtype: torch.dtype, head_dim: int, drifts: bool) -> tuple[str, str]:
    """The choice of `auto`, and the reason."""
    chosen, reason = "torch", "triton and flex train only on CUDA"
    if device == "cuda" and (dtype not in KERNEL_DTYPES or head_dim > MAX_HEAD_DIM):
        reason = f"triton and flex take neither {torch.float64} nor head dims above {MAX_HEAD_DIM}"
    elif device == "cuda":
        capability = torch.cuda.get_device_capability(index)
        if capability[0] in _TRITON_FAMILIES and has_triton():
            chosen, reason = "triton", f"its tests have passed on compute capability {capability[0]}.x"
        elif drifts:
            chosen, reason = ("triton" if has_triton() else "torch"), "flex does not train a drift"
        elif head_dim >= 16:
            chosen = "flex"
            reason = "no Triton here, or its kernels' tests have not passed on compute capability {}.{}".format(
                *capability
            )
        else:
            reason = f"flex takes no head dims below 16, got {head_dim}"
    logger.info("backend 'auto': using '%s' for head dim %d in %s on %s", chosen, head_dim, dtype, device)
    return chosen, reason


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor,
    lifetimes: Lifetimes,
    scale: float | None = None,
    *,
    query_bias: Tensor | None = None,
) -> Tensor:
    """The O(N²) definition over lifetimes."""
    return reference_attention(q, k, v, key_bias, lifetimes.to_dense(), scale, query_bias=query_bias)


ATTENTIONS: dict[str, Attention] = {
    "triton": fused_attention,
    "flex": flex_segment_attention,
    "torch": segment_attention,
    "reference": dense_attention,
}


def attend(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor,
    ranks: Tensor,
    keep: KeepRule,
    packing: Packing | None = None,
    *,
    scale: float | None = None,
    query_bias: Tensor | None = None,
) -> Tensor:
    """Dynamic mask attention by a backend, `[B, H, N, D]`; `query_bias` is `[B, G, N]`, as in `fused_attention`."""
    if backend != "reference":
        mask = Lifetimes.selected(ranks, keep, packing)
        return ATTENTIONS[backend](q, k, v, key_bias, mask, scale, query_bias=query_bias)
    packing = packing or Packing()  # the reference builds its own mask and shares nothing with the others
    dense = reference_mask(
        ranks,
        keep_window_size=keep.window,
        documents=packing.documents,
        padding=packing.padding,
        keep_last=keep.last,
        sinks=keep.sinks,
    )
    return reference_attention(q, k, v, key_bias, dense, scale, query_bias=query_bias)
