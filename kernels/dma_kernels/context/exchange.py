"""The keys of earlier parts that the queries of this part may see, in front of its own.

B batch, H query heads, G KV heads, R = G or 1 heads of a mask, P processes, n length of a part, K keys that each
process sends, M keys that it keeps of all earlier parts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dma_kernels.context.group import ContextGroup, PartPacking
from dma_kernels.context.survivors import Reach, survivors
from dma_kernels.keep_rule import KeepRule, check_at_least
from dma_kernels.lifetime_masks import Lifetimes, check_ranks
from dma_kernels.packing import Packing


@dataclass(frozen=True)
class ExtendedKeys:
    """M keys of earlier parts, followed by the n keys of this part.

    Attributes:
        rows: tensors of these keys, `[B, G, M + n, ...]` each.
        lifetimes: the mask, for M + n positions; the last n are the queries of this part.
        earlier: M. If there are fewer earlier keys, the first of the M are padding.
    """

    rows: Sequence[Tensor]
    lifetimes: Lifetimes
    earlier: int

    def attend(self, attention: Callable[..., Tensor], q: Tensor, query_bias: Tensor | None = None) -> Tensor:
        """Attention of the part's queries to keys, values and biases, the first three tensors of `rows`.

        Args:
            attention: a function of q, k, v, key biases, lifetimes and `query_bias`, such as `fused_attention`.
            q: `[B, H, n, D]`.
            query_bias: passed to `attention`, `[B, G, n]`.

        Returns:
            `[B, H, n, D]`.
        """
        k, v, key_bias = self.rows[:3]
        asked, bias = self.with_queries(q), None if query_bias is None else self.with_queries(query_bias, first=True)
        return attention(asked, k, v, key_bias, self.lifetimes, query_bias=bias)[:, :, self.earlier :]

    def with_queries(self, x: Tensor, first: bool = False) -> Tensor:
        """`[B, H, n, ...]` with M positions in front: zeros, or copies of the first position, without a gradient."""
        front = x[:, :, :1].detach() if first else x.new_zeros(()).expand(*x.shape[:2], 1, *x.shape[3:])
        return torch.cat([front.expand(-1, -1, self.earlier, *x.shape[3:]), x], dim=2)


def exchange_keys(
    group: ContextGroup, rows: Sequence[Tensor], ranks: Tensor, keep: KeepRule, packing: Packing | None = None
) -> ExtendedKeys:
    """Send the keys that later parts may see, and select among the keys of earlier parts and of this one.

    All processes of the group call it, with parts of equal length. One all-gather takes w + r - 1 + s keys of each
    process and KV head, or all keys of a shorter part. A reduce-scatter returns the gradient of `rows`.

    Args:
        group: the processes.
        rows: tensors of the keys, floating `[B, G, n, ...]`: keys after the rotary embedding, values, biases.
        ranks: `[B, G, n]`, of the same dtype in all processes. A drift must include that of earlier parts
            (`drift_before`).
        keep: the keep rule.
        packing: documents and padding of this part, from `ContextGroup.pack`.

    Returns:
        Keys of earlier parts and of this one, and their mask: a query sees what it would see in the whole sequence.

    Raises:
        ValueError: on wrong shapes, dtypes or devices, or a packing that was not made by `ContextGroup.pack`.
    """
    check_ranks(ranks)
    extended, all_ranks, all_packing, earlier = _extended(group, rows, ranks, Reach.of(keep), packing)
    mask = Lifetimes.selected(all_ranks, keep, all_packing)
    return ExtendedKeys(extended, _by_head(mask, len(ranks)), earlier)


def exchange_window(
    group: ContextGroup, rows: Sequence[Tensor], window: int, packing: Packing | None = None
) -> ExtendedKeys:
    """`exchange_keys` for a sliding window of `window` positions; takes `window - 1` keys of earlier parts.

    Raises:
        ValueError: on wrong shapes, dtypes or devices, a window below 1, or a packing that was not made by
            `ContextGroup.pack`.
    """
    check_at_least("window", window, 1)
    ranks = rows[0].new_zeros(len(rows[0]), 1, rows[0].shape[2], dtype=torch.float32)
    extended, all_ranks, all_packing, earlier = _extended(group, rows, ranks, Reach.of_window(window), packing)
    mask = Lifetimes.sliding_window(all_ranks.shape[-1], window, ranks.device, packing=all_packing)
    return ExtendedKeys(extended, _by_head(mask, len(ranks)), earlier)


def _extended(
    group: ContextGroup, rows: Sequence[Tensor], ranks: Tensor, reach: Reach, packing: Packing | None
) -> tuple[list[Tensor], Tensor, Packing, int]:
    """Rows `[B, G, M + n, ...]`, ranks `[B * R, 1, M + n]`, the packing of each of these, and M."""
    _check(rows, ranks, packing)
    heads, length = ranks.shape[1:]
    packing = packing or PartPacking()
    own = _of_part(packing, heads)
    if group.size == 1 or not reach.count:
        return list(rows), ranks.detach().flatten(0, 1)[:, None], own, 0
    count = min(reach.count, length)
    chosen = survivors(ranks.flatten(0, 1)[:, None], reach, own, count).unflatten(0, (-1, heads))  # [B, R, K]
    sent = [take(row, chosen) for row in rows]
    state = take(_states(packing, ranks), chosen)
    *received, all_ranks, states = group.gather([*sent, take(ranks.detach(), chosen), state])

    # Lists of earlier parts come after those of this and later parts, which count as padding.
    lists = _in_line(all_ranks, group), _in_line(states, group)  # [B, R, P * K]
    late = torch.arange(group.size * count, device=ranks.device) < (group.size - group.rank) * count
    first_run = None if packing.runs is None else packing.runs[:, :1]
    list_packing = _of_list(lists[1], late, first_run)
    earlier = min(reach.count, (group.size - 1) * count)
    kept = survivors(lists[0].flatten(0, 1)[:, None], reach, list_packing, earlier)  # [B * R, M]
    place = kept.unflatten(0, (-1, heads))
    absent = late[place]  # [B, R, M]
    extended = [
        torch.cat([take(_in_line(x, group), place).masked_fill(_like(absent, row), 0), row], dim=2)
        for x, row in zip(received, rows, strict=True)
    ]
    all_ranks = torch.cat([take(lists[0], place), ranks.detach()], dim=2).flatten(0, 1)[:, None]
    return extended, all_ranks, _joined(list_packing, kept, own, length), earlier


def take(x: Tensor, place: Tensor) -> Tensor:
    """Keys of `x` [B, G, n, ...] at places `[B, G or 1, K]`, `[B, G, K, ...]`."""
    index = place.expand(-1, x.shape[1], -1).unflatten(2, (-1, *[1] * (x.ndim - 3)))
    return x.gather(2, index.expand(-1, -1, -1, *x.shape[3:]))


def _check(rows: Sequence[Tensor], ranks: Tensor, packing: Packing | None) -> None:
    batch, heads, length = ranks.shape
    for row in rows:
        shape = row.shape[:3]
        fits = row.ndim >= 3 and shape[0] == batch and heads in (1, shape[1]) and shape[2] == length
        if not fits or row.device != ranks.device or not row.is_floating_point():
            raise ValueError(
                f"rows: expected floating [{batch}, {heads}, {length}, ...] on {ranks.device} as ranks, got "
                f"{row.dtype} {list(row.shape)} on {row.device}"
            )
    if packing is None:
        return
    packing.check_fits(batch, ranks)
    if packing.documents is not None and not isinstance(packing, PartPacking):
        raise ValueError(
            "packing: expected documents numbered along the whole rows, got those of this part alone; use "
            "ContextGroup.pack"
        )


def _of_part(packing: Packing, heads: int) -> Packing:
    """The packing of a part, repeated so that each head is a row; documents count from 0."""
    runs = packing.runs
    return _packing(
        None if runs is None else (runs - runs[:, :1]).repeat_interleave(heads, 0),
        None if packing.padding is None else packing.padding.repeat_interleave(heads, 0),
    )


def _packing(runs: Tensor | None, padding: Tensor | None) -> Packing:
    return Packing(documents=runs, padding=padding, runs=runs)


def _states(packing: Packing, ranks: Tensor) -> Tensor:
    """Number of a key's document, and whether it is padding, as one integer, int32 `[B, R, n]`."""
    state = torch.zeros_like(ranks[:, 0], dtype=torch.int32)
    if packing.runs is not None:
        state = state + 2 * packing.runs.int()
    if packing.padding is not None:
        state = state + packing.padding.int()
    return state[:, None].expand_as(ranks)


def _of_list(state: Tensor, late: Tensor, first_run: Tensor | None) -> Packing:
    """The packing of the received keys, `[B * R, P * K]`: run 1 is the document that continues in this part.

    All other documents together are run 0, since no query of this part sees their keys.
    """
    padding = (state % 2 == 1) | late
    if first_run is None:
        return _packing(None, padding.flatten(0, 1))
    same = (state // 2 == first_run[:, None]) & ~late
    return _packing(same.long().flatten(0, 1), padding.flatten(0, 1))


def _joined(received: Packing, kept: Tensor, own: Packing, length: int) -> Packing:
    """The packing of the received keys that are kept, followed by the packing of this part."""
    assert received.padding is not None
    own_padding = own.padding
    if own_padding is None:
        own_padding = torch.zeros(len(kept), length, dtype=torch.bool, device=kept.device)
    padding = torch.cat([received.padding.gather(-1, kept), own_padding], dim=-1)
    if received.runs is None or own.runs is None:
        return _packing(None, padding)
    return _packing(torch.cat([received.runs.gather(-1, kept), own.runs + 1], dim=-1), padding)


def _in_line(x: Tensor, group: ContextGroup) -> Tensor:
    """`[P, B, G, K, ...] -> [B, G, P * K, ...]`, this part and later ones first, then the earlier ones."""
    ordered = torch.cat([x[group.rank :], x[: group.rank]])
    return ordered.permute(1, 2, 0, *range(3, x.ndim)).flatten(2, 3)


def _like(mask: Tensor, row: Tensor) -> Tensor:
    """`[B, R, M]` with as many dimensions as a row has."""
    return mask.unflatten(2, (-1, *[1] * (row.ndim - 3)))


def _by_head(mask: Lifetimes, batch: int) -> Lifetimes:
    """The mask of `[B * R, 1, M + n]` as one of `[B, R, M + n]`."""
    birth, death = (x.expand(mask.death.shape)[:, 0].unflatten(0, (batch, -1)) for x in (mask.birth, mask.death))
    return Lifetimes(birth, death, mask.capacity, born_at_position=True)
