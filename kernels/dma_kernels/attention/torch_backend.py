"""Attention as dense batched matmuls per segment, in plain PyTorch: O(N·(C+S)) time and memory on any device.

B batch, H query heads, G KV heads, R = H / G group, N length, D head dim, S segment length, K slots, Z segments.
"""

from typing import Literal, overload

import torch
from torch import Tensor

from dma_kernels.checks import check_attention_inputs, check_lifetimes
from dma_kernels.lifetime_masks import Lifetimes
from dma_kernels.precision import without_autocast
from dma_kernels.ranks import saturated
from dma_kernels.reference import masked_average, masked_logsumexp, unseen
from dma_kernels.renamed import taking_renamed
from dma_kernels.segments.biases import segment_shifts
from dma_kernels.segments.slots import SegmentSlots
from dma_kernels.wide_biases import are_wide


@overload
def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, lifetimes: Lifetimes, scale: float | None = None,
    segment_length: int | None = None, return_lse: Literal[False] = False, *, query_bias: Tensor | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, lifetimes: Lifetimes, scale: float | None = None,
    segment_length: int | None = None, *, return_lse: Literal[True], query_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, lifetimes: Lifetimes, scale: float | None = None,
    segment_length: int | None = None, return_lse: bool = False, *, query_bias: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
@taking_renamed(scores="key_bias")
def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor,
    lifetimes: Lifetimes,
    scale: float | None = None,
    segment_length: int | None = None,
    return_lse: bool = False,
    *,
    query_bias: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the live keys, with a bias for each key; differentiable in q, k, v and biases.

    A NaN or infinity in k or v shows in all queries of every segment that holds the key, even in earlier queries.

    Args:
        q: `[B, H, N, D]`, float64, float32, bfloat16 or float16; computed in at least float32.
        k: `[B, G, N, D]`, H a multiple of G.
        v: `[B, G, N, D]`.
        key_bias: added to the logits of each key, float32 or float64 `[B, G, N]`.
        lifetimes: the mask, for B or 1 sequences and G or 1 KV heads.
        scale: factor of q·k, by default `1 / sqrt(D)`.
        segment_length: S, by default about the mask's capacity.
        return_lse: also return the log-sum-exp of each query's logits.
        query_bias: added to all logits of a query, float32 or float64 `[B, G, N]`. It does not change the output, and
            the log-sum-exp leaves it out. Its gradient is the sum of dS, the gradient of the logits, over the keys of a
            query and the heads of the group, which is 0 except for rounding. If key_bias is float64 and q is not, the
            query bias of each segment's first query is added to the key biases before they are rounded to float32.

    Returns:
        Output `[B, H, N, D]` in the dtype of q, and with `return_lse` the log-sum-exp `[B, H, N]` in float32 (float64
        if q or key_bias is). A query without any key gives 0 and -inf.

    Raises:
        ValueError: if shapes, dtypes or devices do not match.
    """
    check_attention_inputs(q, k, v, key_bias, query_bias)
    check_lifetimes(lifetimes, k)
    dtype = torch.promote_types(q.dtype, torch.float32)
    heads, kv_heads = q.shape[1], k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    slots = SegmentSlots.plain(lifetimes, q.shape[0], kv_heads, segment_length)
    with without_autocast(q.device):
        k_seg, v_seg = (slots.gather_plain(x).to(dtype) for x in (k, v))  # [Z, G, K, D]
        bias, shift = _slot_biases(slots, key_bias, query_bias, dtype)
        q_seg = slots.split_queries(q.to(dtype) * scale)  # [Z, H, S, D]
        q_seg = q_seg.unflatten(1, (kv_heads, -1)).flatten(2, 3)  # [Z, G, R * S, D]

        logits = q_seg @ k_seg.mT + bias[:, :, None]  # [Z, G, R * S, K]
        visible = slots.visible().repeat(1, 1, heads // kv_heads, 1)
        biased = logits
        if query_bias is not None:
            by_query = slots.split_queries(unseen(query_bias.to(dtype))[..., None])  # [Z, G, S, 1]
            biased = logits + by_query.repeat(1, 1, heads // kv_heads, 1)
        out = _join_heads(masked_average(biased, visible, v_seg), slots).to(q.dtype)
        if not return_lse:
            return out
        lse = masked_logsumexp(logits, visible)  # [Z, G, R * S]
        lse = lse if shift is None else lse.double() - shift[..., None]
        return out, _join_heads(lse[..., None], slots).squeeze(-1)


def _slot_biases(
    slots: SegmentSlots, key_bias: Tensor, query_bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """The sum that is added to logits, `[Z, G, K]`, and the part of it that each segment adds, `[Z, G]`, or None."""
    if not are_wide(key_bias, dtype):
        return slots.gather_plain(saturated(key_bias).to(dtype)[..., None]).squeeze(-1), None
    bias = slots.gather_biases_plain(key_bias, query_bias)
    if query_bias is None:
        return bias, bias.new_zeros(bias.shape[:2], dtype=torch.float64)
    return bias, segment_shifts(query_bias, slots.segment_length)


def _join_heads(x: Tensor, slots: SegmentSlots) -> Tensor:
    """`[Z, G, R * S, D] -> [B, H, N, D]`."""
    return slots.join_queries(x.unflatten(2, (-1, slots.segment_length)).flatten(1, 2))
