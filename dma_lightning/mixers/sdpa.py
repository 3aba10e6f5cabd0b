"""Attention with masks other than dynamic masks, by PyTorch's own kernels.

B batch, H query heads, G KV heads, n queries, M keys, D head dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dma_flex import flex_mask_attention
from dma_kernels import Lifetimes
from dma_kernels.attention.ops import KERNEL_DTYPES
from dma_lightning.mixers.position_cache import Places

ROWS = 256  # queries whose mask is in memory at once, for all heads of a group
PAIRS = 1 << 20  # pairs of query and key whose logits are in memory at once, for each head

SDPA_OR_FLEX = "PyTorch's scaled_dot_product_attention; FlexAttention on CUDA for documents and padding"


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
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | ~alive, scale=scale, enable_gqa=True)
    return out.masked_fill(~alive, 0)


def lifetime_attention(q: Tensor, k: Tensor, v: Tensor, mask: Lifetimes, scale: float | None = None) -> Tensor:
    """`masked_attention` over lifetimes; on CUDA, it uses FlexAttention, which skips empty blocks."""
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
    """`masked_attention` of queries to the past of their documents, for a few queries at a time.

    The heads of a group are passed as additional queries of one head. Otherwise PyTorch would copy the keys for each.
    """
    group, parts = q.shape[1] // k.shape[1], []
    for part, start in zip(q.split(ROWS, dim=2), range(0, q.shape[2], ROWS), strict=True):
        mask = queries.rows(start, start + ROWS).sees(keys, window).repeat(1, 1, group, 1)
        by_group = part.unflatten(1, (k.shape[1], group)).flatten(2, 3)  # [B, G, R * n, D]
        out = masked_attention(by_group, k, v, mask, scale)
        parts.append(out.unflatten(2, (group, -1)).flatten(1, 2))
    return torch.cat(parts, dim=2)
