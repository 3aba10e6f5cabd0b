"""Checks of the tensors that every attention backend takes."""

import torch
from torch import Tensor

from dma_kernels.lifetime_masks import Lifetimes


def check_attention_inputs(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None = None, query_bias: Tensor | None = None
) -> None:
    """Raise `ValueError` unless q `[B, H, N, D]`, k and v `[B, G, N, D]` and biases `[B, G, N]` match."""
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"expected q [B, H, N, D] and k [B, G, N, D], got {list(q.shape)} and {list(k.shape)}")
    batch, heads, length, head_dim = q.shape
    kv_heads = k.shape[1]
    row, element = (batch, kv_heads, length, head_dim), (batch, kv_heads, length)
    expected: dict[str, tuple[int, ...]] = {"k": row, "v": row, "key_bias": element, "query_bias": element}
    if head_dim == 0:
        raise ValueError(f"expected a head dim of at least 1, got q {list(q.shape)}")
    for name, x in {"k": k, "v": v, "key_bias": key_bias, "query_bias": query_bias}.items():
        if x is None:
            continue
        if x.shape != expected[name]:
            raise ValueError(
                f"{name}: expected {list(expected[name])} for q {list(q.shape)} and {kv_heads} KV heads, "
                f"got {list(x.shape)}"
            )
        if x.device != q.device:
            raise ValueError(f"{name}: expected on {q.device} as q, got {x.device}; move it there first")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"query heads must be a multiple of KV heads, got {heads} and {kv_heads}")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ValueError(f"q, k and v must have one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    for name, x in {"key_bias": key_bias, "query_bias": query_bias}.items():
        if x is not None and x.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name}: expected torch.float32 or torch.float64, got {x.dtype}; compute it in one of these, since a "
                "later cast does not bring back bits that were rounded off"
            )


def check_no_tangents(*inputs: Tensor | None) -> None:
    """Raise `ValueError` for forward-mode differentiation, for which a custom operation would silently give 0."""
    given = [x for x in inputs if x is not None]
    if any(torch.autograd.forward_ad.unpack_dual(x).tangent is not None for x in given):
        raise ValueError("backend 'triton' has no forward-mode derivative (jvp); use backend 'reference' for it")


def check_lifetimes(lifetimes: Lifetimes, k: Tensor) -> None:
    """Raise `ValueError` unless a mask fits keys `[B, G, N, D]`."""
    batch, kv_heads, length = lifetimes.death.shape
    fits = batch in (1, k.shape[0]) and kv_heads in (1, k.shape[1]) and length == k.shape[2]
    if not fits or lifetimes.death.device != k.device:
        raise ValueError(
            f"lifetimes: expected [{k.shape[0]} or 1, {k.shape[1]} or 1, {k.shape[2]}] on {k.device} for k "
            f"{list(k.shape)}, got {list(lifetimes.death.shape)} on {lifetimes.death.device}"
        )
