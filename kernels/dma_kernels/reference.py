"""The O(N²) definition of dynamic mask attention, row by row: the oracle of everything faster.

B batch, H query heads, G KV heads, N length, D head dim.
"""

from typing import Literal, overload

import torch
from torch import Tensor

from dma_kernels.checks import check_attention_inputs
from dma_kernels.fixed_point import ranks_of_steps
from dma_kernels.keep_rule import KeepRule
from dma_kernels.lifetime_masks import check_ranks
from dma_kernels.packing import Packing
from dma_kernels.precision import without_autocast
from dma_kernels.ranks import as_integers, saturated
from dma_kernels.renamed import taking_renamed
from dma_kernels.wide_biases import are_wide, in_float32, shift_of


def reference_mask(
    ranks: Tensor,
    keep_window_size: int,
    *,
    documents: Tensor | None = None,
    padding: Tensor | None = None,
    keep_last: int = 0,
    sinks: int = 0,
    drift: Tensor | None = None,
) -> Tensor:
    """The dynamic mask by its definition: a top-w over each query's own past. Arguments as in `Lifetimes.top_w`.

    Returns:
        bool `[B, G, N, N]` (query, key).

    Raises:
        ValueError: on wrong shapes, dtypes or devices, or sizes out of range.

    Source: arXiv 2508.02124v6, equation 4, with the causal mask before the selection.
    """
    check_ranks(ranks)
    keep = KeepRule(keep_window_size, keep_last, sinks)
    packing = Packing.of(documents, padding, batch=ranks.shape[0], like=ranks)
    runs = None if packing is None else packing.runs
    if drift is not None:
        ranks = ranks_of_steps(ranks, drift, padding)
    length = ranks.shape[-1]
    position = torch.arange(length, device=ranks.device)
    allowed = (position <= position[:, None])[None, None]  # [B or 1, 1, N, N]
    if runs is not None:
        allowed = allowed & (runs[:, None, None, :] == runs[:, None, :, None])
    if padding is not None:
        allowed = allowed & ~padding[:, None, None, :]

    # Place in the order by (rank, position): the later of two equal ranks wins.
    priority = as_integers(ranks).argsort(dim=-1, stable=True).argsort(dim=-1)  # [B, G, N]
    lowest = -1
    recent = position > position[:, None] - keep.last
    candidates = torch.where(allowed & ~recent, priority[..., None, :], lowest)  # [B, G, N, N]
    kept = candidates.topk(min(keep.window, length), dim=-1).indices
    mask = torch.zeros_like(candidates, dtype=torch.bool).scatter_(-1, kept, True)

    mask |= recent
    place_in_document = (allowed & (position < position[:, None])).sum(-1)  # [B or 1, 1, N] real keys before
    mask |= (place_in_document < keep.sinks)[..., None, :]
    return mask & allowed


@overload
def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, mask: Tensor, scale: float | None = None,
    return_lse: Literal[False] = False, *, query_bias: Tensor | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, mask: Tensor, scale: float | None = None,
    *, return_lse: Literal[True], query_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, mask: Tensor, scale: float | None = None,
    return_lse: bool = False, *, query_bias: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
@taking_renamed(scores="key_bias")
def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor,
    mask: Tensor,
    scale: float | None = None,
    return_lse: bool = False,
    *,
    query_bias: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the keys of a dense mask, with a bias for each key; O(N²).

    Args:
        q: `[B, H, N, D]`.
        k: `[B, G, N, D]`, H a multiple of G.
        v: `[B, G, N, D]`.
        key_bias: added to the logits of each key, float32 or float64 `[B, G, N]`. Here and in every other backend,
            `saturated` limits it first.
        mask: bool `[B or 1, G or 1, N, N]` (query, key), True where the query sees the key.
        scale: factor of q·k, by default `1 / sqrt(D)`.
        return_lse: also return the log-sum-exp of each query's logits.
        query_bias: added to all logits of a query, float32 or float64 `[B, G, N]`. It does not change the output, and
            the log-sum-exp leaves it out. Its gradient is the sum of dS over the keys of a query and the heads of the
            group, which is 0 except for rounding. If key_bias is float64 and q is not, the sum of both biases is
            rounded to float32.

    Returns:
        Output `[B, H, N, D]` in the dtype of q, and with `return_lse` the log-sum-exp `[B, H, N]` in float32 (float64
        if q or key_bias is). A query without any key gives 0 and -inf.

    Raises:
        ValueError: if shapes, dtypes or devices do not match.

    Source: arXiv 2508.02124v6, equations 5 and 6.
    """
    check_attention_inputs(q, k, v, key_bias, query_bias)
    _check_mask(mask, k)
    dtype = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k_full, v_full = (x.to(dtype).repeat_interleave(group, dim=1) for x in (k, v))
    bias, shift = _dense_bias(key_bias, query_bias, dtype)
    mask = mask.expand(-1, k.shape[1], -1, -1).repeat_interleave(group, dim=1)

    with without_autocast(q.device):
        logits = q.to(dtype) @ k_full.transpose(-1, -2) * scale + bias.repeat_interleave(group, dim=1)  # [B, H, N, N]
        biased = logits
        if query_bias is not None:
            biased = logits + unseen(query_bias.to(dtype)).repeat_interleave(group, dim=1)[..., None]
        out = masked_average(biased, mask, v_full).to(q.dtype)
    if not return_lse:
        return out
    lse = masked_logsumexp(logits, mask)
    return out, lse if shift is None else lse.double() - shift.repeat_interleave(group, dim=1)


def _dense_bias(key_bias: Tensor, query_bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The sum that is added to logits, `[B, G, N or 1, N]`, and the part that each query adds, `[B, G, N]`, or None."""
    if not are_wide(key_bias, dtype):
        return saturated(key_bias).to(dtype)[:, :, None], None
    shift = torch.zeros_like(key_bias) if query_bias is None else shift_of(query_bias)
    return in_float32(key_bias[:, :, None] + shift[..., None]), shift


def unseen(query_bias: Tensor) -> Tensor:
    """0 with the gradient of a query bias, to add to logits: the bias itself cancels in softmax, but rounds them."""
    return (query_bias - query_bias.detach()).nan_to_num()  # infinite biases also give NaN


def masked_average(logits: Tensor, mask: Tensor, v: Tensor) -> Tensor:
    """Softmax over the keys where `mask` is True, applied to `v`; 0, with zero gradients, for a query without any.

    Args:
        logits: `[..., queries, keys]`.
        mask: bool, broadcastable to `logits`.
        v: `[..., keys, D]`.

    Returns:
        `[..., queries, D]`.
    """
    filled, empty = _fill_masked(logits, mask)
    return (filled.softmax(-1) @ v).masked_fill(empty[..., None], 0)


def masked_logsumexp(logits: Tensor, mask: Tensor) -> Tensor:
    """Log-sum-exp over the keys where `mask` is True; -inf, with zero gradient, for a query without any."""
    filled, empty = _fill_masked(logits, mask)
    return filled.logsumexp(-1).masked_fill(empty, -torch.inf)


def _fill_masked(logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Logits with masked entries at -inf, and which rows have no key above -inf; these rows are filled with 0."""
    # The finite fill keeps NaN out of rows without a key, even in the backward. The caller clears their result.
    seen = mask & (logits != -torch.inf)
    empty = ~seen.any(-1)
    fill = torch.zeros_like(empty, dtype=logits.dtype).masked_fill(~empty, -torch.inf)
    return torch.where(seen, logits, fill[..., None]), empty


def _check_mask(mask: Tensor, k: Tensor) -> None:
    batch, kv_heads, length = k.shape[:3]
    fits = mask.ndim == 4 and mask.shape[0] in (1, batch) and mask.shape[1] in (1, kv_heads)
    if not fits or mask.shape[2:] != (length, length) or mask.dtype != torch.bool or mask.device != k.device:
        raise ValueError(
            f"mask: expected bool [{batch} or 1, {kv_heads} or 1, {length}, {length}] on {k.device}, "
            f"got {mask.dtype} {list(mask.shape)} on {mask.device}"
        )
