"""Attention of new queries to the slots of a cache.

B batch, H query heads, G KV heads, R = H / G group, n queries, D head dim, C slots, M keys.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dma_kernels.lifetime_masks import Lifetimes
from dma_kernels.precision import without_autocast
from dma_kernels.reference import masked_average
from dma_kernels.wide_biases import are_wide, in_float32

Attention = Callable[..., Tensor]  # takes q, k, v, key_bias and lifetimes, and query_bias as a keyword


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, visible: Tensor, query_bias: Tensor | None = None
) -> Tensor:
    """Softmax attention of a few queries, computed in at least float32.

    Args:
        q: `[B, H, n, D]`.
        k: `[B, G, C, D]`.
        v: `[B, G, C, D]`.
        key_bias: `[B, G, C]`.
        visible: bool `[B, G, C]`, or `[B, G, n, C]` if queries differ.
        query_bias: `[B, G, n]`, added to the key biases before these are rounded; by default 0.

    Returns:
        `[B, H, n, D]` in the dtype of q; 0 for a query that sees nothing.
    """
    dtype, kv_heads = torch.promote_types(q.dtype, torch.float32), k.shape[1]
    if visible.ndim == 3:
        visible = visible[:, :, None].expand(-1, -1, q.shape[2], -1)
    v = v.masked_fill(~visible.any(2)[..., None], 0)  # a dead key may hold a NaN, and 0 times NaN is NaN
    with without_autocast(q.device):
        q_rows = (q.to(dtype) * q.shape[-1] ** -0.5).unflatten(1, (kv_heads, -1)).flatten(2, 3)  # [B, G, R * n, D]
        bias = key_bias[:, :, None] if query_bias is None else key_bias[:, :, None] + query_bias[..., None]
        bias = in_float32(bias) if are_wide(bias, dtype) else bias.to(dtype)
        if query_bias is not None:
            bias = bias.repeat(1, 1, q.shape[1] // kv_heads, 1)  # [B, G, R * n, C]
        logits = q_rows @ k.to(dtype).transpose(-1, -2) + bias
        visible = visible.repeat(1, 1, q.shape[1] // kv_heads, 1)
        out = masked_average(logits, visible, v.to(dtype))
    return out.unflatten(2, (-1, q.shape[2])).flatten(1, 2).to(q.dtype)


def attend_from_last(
    attention: Attention,
    q: Tensor,
    keys: tuple[Tensor, Tensor, Tensor],
    lifetimes: Lifetimes,
    query_bias: Tensor | None,
) -> Tensor:
    """Attention from the last n of M positions, computed by a backend.

    Args:
        attention: the function of a backend.
        q: `[B, H, n, D]`.
        keys: k and v `[B, G, M, D]`, and the biases of the keys `[B, G, M]`.
        lifetimes: lifetimes of the M keys.
        query_bias: `[B, G, n]`, float32 or float64; see `fused_attention`.

    Returns:
        `[B, H, n, D]`.
    """
    k, v, key_bias = keys
    past = k.shape[2] - q.shape[2]
    if query_bias is not None:
        query_bias = F.pad(query_bias, (past, 0), mode="replicate")
    q = F.pad(q, (0, 0, past, 0))  # zeros as queries of the past, whose outputs are dropped
    return attention(q, k, v, key_bias, lifetimes, query_bias=query_bias)[:, :, past:]
