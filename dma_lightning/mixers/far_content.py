"""Attention in which the content of a key is added to its logits only from a certain distance on.

Backends take one bias per key. So every key occurs twice, in a sequence of twice the length: at its own position with
its bias as a near key, and `distance` positions later with its bias as a far key. The first copy dies when the second
is born.

    slot 2t: far copy of key t - distance, without a query        slot 2t + 1: key and query t

B batch, N length, H query heads, G KV heads, D head dim.
"""

import torch
from torch import Tensor

from dma_kernels import Lifetimes
from dma_lightning.backends import Attention


def attend_with_far_bias(
    attention: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    near_bias: Tensor,
    far_bias: Tensor,
    lifetimes: Lifetimes,
    distance: int,
    query_bias: Tensor | None = None,
) -> Tensor:
    """`attention` with two biases per key; it costs twice as much.

    Args:
        attention: a function of q, k, v, a bias per key, and lifetimes.
        q: `[B, H, N, D]`.
        k: `[B, G, N, D]`.
        v: same shape.
        near_bias: added to a key's logits for queries less than `distance` positions after it, `[B, G, N]`.
        far_bias: added to its logits for later queries, same shape.
        lifetimes: the mask, in which every real key lives at least for `distance` positions or to its document's end.
        distance: at least 1.
        query_bias: passed to `attention`, `[B, G, N]`.

    Returns:
        `[B, H, N, D]`.
    """
    length = lifetimes.length
    position = torch.arange(length, dtype=torch.int32, device=q.device)
    arrived = position >= distance
    source = (position - distance).clamp(min=0)

    def twice(far: Tensor, near: Tensor, dim: int) -> Tensor:
        return torch.stack([far.index_select(dim, source), near], dim + 1).flatten(dim, dim + 1)

    birth, death = lifetimes.birth, lifetimes.death
    near_death = torch.where(death > birth, 2 * torch.minimum(death, position + distance), 2 * position + 1)
    far_death = torch.where(arrived, 2 * death.index_select(-1, source), 0).maximum(2 * position)
    slot = torch.arange(2 * length, dtype=torch.int32, device=q.device)
    both = torch.stack([far_death, near_death], -1).flatten(-2)
    mask = Lifetimes(slot.expand_as(both), both, min(lifetimes.capacity, 2 * length), born_at_position=True)
    asked = torch.stack([torch.zeros_like(q), q], 3).flatten(2, 3)
    if query_bias is not None:
        query_bias = query_bias.repeat_interleave(2, -1)
    out = attention(asked, twice(k, k, 2), twice(v, v, 2), twice(far_bias, near_bias, 2), mask, query_bias=query_bias)
    return out.unflatten(2, (length, 2)).select(3, 1)
