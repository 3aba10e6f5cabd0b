"""Attention under masks that are no dynamic ones, by PyTorch's own kernels.

B batch, H query heads, G KV heads, n queries, M keys, D head dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dma_flex import flex_mask_attention
from dma_kernels import Lifetimes
from dma_kernels.fused_attention import KERNEL_DTYPES
from dma_lightning.mixers.position_cache import Places

_ROWS = 1024  # queries whose mask is in memory at once


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """Softmax attention over the keys of a dense mask; a query without any key gives 0, and no gradient.

    Args:
        q: `[B, H, n, D]`.
        k: `[B, G, M, D]`.
        v: `[B, G, M, Dv]`.
        mask: bool `[B or 1, H or 1, n, M]`, True where a query sees a key.
        scale: factor of q·k, by default `1 / sqrt(D)`.

    Returns:
        `[B, H, n, Dv]`.
    """
    alive = mask.any(-1, keepdim=True)
    heads = q.shape[1]
    if k.shape[1] == 1 < heads and mask.shape[1] == 1:  # as more queries of one head, or keys would be copied for each
        rows, all_alive = q.flatten(1, 2)[:, None], alive.repeat(1, 1, heads, 1)
        seen = (mask | ~alive).repeat(1, 1, heads, 1)
        out = F.scaled_dot_product_attention(rows, k, v, attn_mask=seen, scale=scale).masked_fill(~all_alive, 0)
        return out.squeeze(1).unflatten(1, (heads, -1))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | ~alive, scale=scale, enable_gqa=True)
    return out.masked_fill(~alive, 0)


def lifetime_attention(q: Tensor, k: Tensor, v: Tensor, mask: Lifetimes, scale: float | None = None) -> Tensor:
    """`masked_attention` over lifetimes: on CUDA by FlexAttention, which skips blocks that nobody sees."""
    if q.is_cuda and q.dtype in KERNEL_DTYPES and min(q.shape[-1], v.shape[-1]) >= 16:
        return flex_mask_attention(q, k, v, mask, scale)
    return masked_attention(q, k, v, mask.to_dense(), scale)


def attend_places(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Places,
    keys: Places,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """`masked_attention` of queries to the past of their documents, a few queries at a time."""
    parts = []
    for start in range(0, q.shape[2], _ROWS):
        end = min(start + _ROWS, q.shape[2])
        mask = queries.rows(start, end).sees(keys, window)
        parts.append(masked_attention(q[:, :, start:end], k, v, mask, scale))
    return torch.cat(parts, dim=2)
