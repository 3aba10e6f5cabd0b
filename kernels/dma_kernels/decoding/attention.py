"""Attention of a few queries to the slots of a cache, in plain PyTorch.

B batch, H query heads, G KV heads, R = H / G group, n queries, D head dim, C slots.
"""

import torch
from torch import Tensor

from dma_kernels.precision import without_autocast
from dma_kernels.reference import masked_average


def decode_attention(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, visible: Tensor) -> Tensor:
    """Softmax attention of a few queries, computed in at least float32.

    Args:
        q: `[B, H, n, D]`.
        k: `[B, G, C, D]`.
        v: `[B, G, C, D]`.
        key_bias: `[B, G, C]`.
        visible: bool `[B, G, C]`, or `[B, G, n, C]` if queries differ.

    Returns:
        `[B, H, n, D]` in the dtype of q; 0 for a query that sees nothing.
    """
    dtype, kv_heads = torch.promote_types(q.dtype, torch.float32), k.shape[1]
    if visible.ndim == 3:
        visible = visible[:, :, None].expand(-1, -1, q.shape[2], -1)
    v = v.masked_fill(~visible.any(2)[..., None], 0)  # a weight of 0 does not stop a NaN that has died
    with without_autocast(q.device):
        q_rows = (q.to(dtype) * q.shape[-1] ** -0.5).unflatten(1, (kv_heads, -1)).flatten(2, 3)  # [B, G, R * n, D]
        logits = q_rows @ k.to(dtype).transpose(-1, -2) + key_bias.to(dtype)[:, :, None]
        visible = visible.repeat(1, 1, q.shape[1] // kv_heads, 1)
        out = masked_average(logits, visible, v.to(dtype))
    return out.unflatten(2, (-1, q.shape[2])).flatten(1, 2).to(q.dtype)
