"""One position enters a cache and attends to it: in plain PyTorch, and as one operation with a Triton kernel.

B batch, H query heads, G KV heads, D head dim, C slots.
"""

import torch
from torch import Tensor

from dma_kernels.decoding.attention import decode_attention
from dma_kernels.decoding.state import CacheState, NewKeys
from dma_kernels.keep_rule import KeepRule
from dma_kernels.launching import on_device_of_first
from dma_kernels.ranks import as_integers, saturated


def decode_step_reference(q: Tensor, new: NewKeys, state: CacheState, keep: KeepRule) -> Tensor:
    """Output `[B, H, 1, D]` of one position within its document; the cache is changed in place.

    Args:
        q: `[B, H, 1, D]`.
        new: the key of that position.
        state: the cache, as large as the rule's capacity.
        keep: which keys stay.
    """
    now, real = state.lengths[:, 0], new.real[:, 0]
    state.seen += real[:, None]
    sink = (real & (state.seen[:, 0] <= keep.sinks))[:, None]  # [B, 1]

    # Of two equal ranks the later wins, so a new key beats an equal one. If keep.last is 0, it competes at once.
    never = torch.iinfo(torch.int64).max
    competes = state.ranked & (state.position <= (now - keep.last)[:, None, None])
    rank = as_integers(state.rank)
    lowest = rank.masked_fill(~competes, never).amin(-1)  # [B, G]
    place = state.position.masked_fill(~competes | (rank != lowest[..., None]), never).argmin(-1)
    new_competes = (real & (keep.last == 0))[:, None]
    over = competes.sum(-1) + new_competes > keep.window
    new_is_lowest = new_competes & (as_integers(new.rank[..., 0]) < lowest)
    wins, evicts = real[:, None] & ~(over & new_is_lowest), over & ~new_is_lowest
    stays = state.ranked.gather(2, place[..., None]) & ~evicts[..., None]
    state.ranked.scatter_(2, place[..., None], stays)

    free = (~state.visible).int().argmax(-1)[..., None]  # [B, G, 1]
    kept = wins | sink
    rows = free[..., None].expand(-1, -1, -1, q.shape[-1])
    written = (
        (state.key, rows, new.key), (state.value, rows, new.value), (state.key_bias, free, saturated(new.key_bias)),
        (state.rank, free, new.rank), (state.position, free, now[:, None, None].expand_as(free)),
        (state.ranked, free, wins[..., None]), (state.sink, free, sink[..., None].expand_as(free)),
    )  # fmt: skip
    for field, at, x in written:
        keeps = kept.view(*kept.shape, *[1] * (x.ndim - 2))
        field.scatter_(2, at, torch.where(keeps, x.to(field.dtype), field.gather(2, at)))
    out = decode_attention(q, state.key, state.value, state.key_bias, state.visible, new.query_bias)
    state.lengths += 1
    return out


def decode_step(q: Tensor, new: NewKeys, state: CacheState, keep: KeepRule) -> Tensor:
    """`decode_step_reference` as one kernel, opaque to torch.compile."""
    real = None if new.padding is None else ~new.padding[:, 0]
    return decode_step_op(
        q, new.key, new.value, new.key_bias, new.rank, new.query_bias, real, *state.all,
        state.document, state.lengths, state.seen, state.arrivals, keep.window, keep.last, keep.sinks,
    )  # fmt: skip


@torch.library.custom_op(
    "dma_kernels::decode_step",
    mutates_args=("key", "value", "key_bias", "rank", "position", "ranked", "sink", "lengths", "seen", "arrivals"),
)
@on_device_of_first
def decode_step_op(
    q: Tensor,
    new_key: Tensor,
    new_value: Tensor,
    new_key_bias: Tensor,
    new_rank: Tensor,
    query_bias: Tensor | None,
    real: Tensor | None,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor,
    rank: Tensor,
    position: Tensor,
    ranked: Tensor,
    sink: Tensor,
    document: Tensor,
    lengths: Tensor,
    seen: Tensor,
    arrivals: Tensor,
    window: int,
    last: int,
    sinks: int,
) -> Tensor:
    """`decode_step` by fields; `real`, bool `[B]`, is False for padding, and None if all positions are real."""
    from dma_kernels.decoding.kernels import launch_decode_step

    new = NewKeys(new_key, new_value, new_key_bias, new_rank, query_bias=query_bias)
    state = CacheState(key, value, key_bias, rank, position, ranked, sink, document, lengths, seen, arrivals)
    return launch_decode_step(q, new, state, real=real, keep=KeepRule(window, last, sinks))


@decode_step_op.register_fake
def _(q: Tensor, *_: object) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)
