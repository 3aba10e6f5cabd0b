"""Which keys the causal top-w keeps, and until when: two parallel steps over segments, no N x N tensor.

Keys are compared by their *orders*: distinct integers, larger for the key that wins, and -1 for a key that does not
take part. Orders already contain the tie rule (the later key wins) and the restart of the selection at document starts,
so all later steps compare plain int32.

B batch, G KV heads, N length, T segments, S segment length, W keep-window size, K candidates.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dma_kernels.ranks import ordered_bits

# How many of the 32 bits of an ordered rank distinguish ranks: the low bits only repeat the sign.
RANK_BITS = 25
LOWEST_PRIORITY = -(1 << (RANK_BITS - 1))  # below the priority of every rank, -inf included

# Per key, pairwise comparison costs 2S and the prefix scan W log(N/S) / S; at S = 64 both are small.
_SELECTION_SEGMENT = 64


@dataclass(frozen=True)
class KeyOrder:
    """A total order of the keys of each head.

    Attributes:
        order: int32 `[..., N]`, distinct where >= 0; the larger order wins; a key with -1 does not take part.
        key: int64 `[..., N]`, the inverse: `key[order[j]] == j`.
    """

    order: Tensor
    key: Tensor

    @classmethod
    def of(cls, priority: Tensor, excluded: Tensor | None = None) -> "KeyOrder":
        """Order by (priority, position): of two equal priorities the later position wins.

        Args:
            priority: integers `[..., N]`.
            excluded: bool, broadcastable to `priority`; a key with True does not take part.
        """
        return cls.of_sorted(priority.sort(dim=-1, stable=True).indices, excluded)

    @classmethod
    def of_sorted(cls, key: Tensor, excluded: Tensor | None = None) -> "KeyOrder":
        """Order of sorted keys: `key`, int64 `[..., N]`, holds their positions, the lowest key first."""
        position = torch.arange(key.shape[-1], dtype=torch.int32, device=key.device)
        order = torch.empty_like(key, dtype=torch.int32).scatter_(-1, key, position.expand_as(key))
        if excluded is not None:
            order = order.masked_fill(excluded, -1)
        return cls(order, key)

    @classmethod
    def of_ranks(cls, ranks: Tensor, runs: Tensor | None = None, padding: Tensor | None = None) -> "KeyOrder":
        """Order by (document, rank, position), padding first; arguments as in `deaths_by_rank`."""
        if ranks.dtype == torch.int64:
            return cls.of_sorted(sorted_keys(ranks, runs, padding))
        return cls.of(key_priorities(ranks, runs, padding))

    def key_of(self, order: Tensor) -> Tensor:
        """Positions of the keys that have these orders, `[..., M]` int64; position 0 for order -1."""
        return self.key.gather(-1, order.clamp(min=0).long())


def split_segments(x: Tensor, segment_length: int, fill: int) -> Tensor:
    """`[..., N] -> [..., T, S]`, the last segment filled up with `fill`."""
    return F.pad(x, (0, -x.shape[-1] % segment_length), value=fill).unflatten(-1, (-1, segment_length))


def segment_snapshots(order: Tensor, count: int, segment_length: int) -> Tensor:
    """The `count` largest orders before the start of each segment.

    Merging two top-w sets is associative, so one parallel prefix scan of log2(T) rounds gives all snapshots.

    Args:
        order: int32 `[..., N]`, distinct where >= 0.
        count: W, the size of a snapshot.
        segment_length: S.

    Returns:
        int32 `[..., T, W]`, descending, filled up with -1.
    """
    own = split_segments(order, segment_length, fill=-1).sort(dim=-1, descending=True).values
    top = F.pad(own, (0, count - segment_length), value=-1)  # [..., T, W]; a negative pad truncates
    segments, reach = top.shape[-2], 1
    while reach < segments:
        # If lists a and b are descending, the elements max(a[i], b[W-1-i]) are the top W of both.
        earlier = top[..., :-reach, :].flip(-1)
        merged = torch.maximum(top[..., reach:, :], earlier).sort(dim=-1, descending=True).values
        top = torch.cat([top[..., :reach, :], merged], dim=-2)
        reach *= 2
    return F.pad(top[..., :-1, :], (0, 0, 1, 0), value=-1)


def top_w_deaths(keys: KeyOrder, window: int, segment_length: int = _SELECTION_SEGMENT) -> Tensor:
    """Death of every key under the causal top-w: the first query that has seen `window` better keys.

    Each segment can be computed by itself. A candidate with g better keys in the snapshot dies at the (W - g)-th better
    key that arrives after the segment's start. Only the S worst keys of the snapshot can die within the segment.

    Returns:
        int32 `[..., N]`: `N` for a key that never dies, and the key's own position for a key that no query sees.
    """
    length = keys.order.shape[-1]
    if window >= length:
        return torch.full_like(keys.order, length)
    segment = min(segment_length, length)
    snapshots = segment_snapshots(keys.order, window, segment)  # [..., T, W]
    arrivals = split_segments(keys.order, segment, fill=-1)  # [..., T, S]

    worst = snapshots[..., -segment:]
    better_than_worst = torch.arange(window - worst.shape[-1], window, dtype=torch.int32, device=worst.device)
    not_better = torch.searchsorted(snapshots.flip(-1), arrivals.contiguous(), right=True, out_int32=True)
    candidates = torch.cat([worst, arrivals], dim=-1)  # [..., T, K]
    better = torch.cat([better_than_worst.expand_as(worst), window - not_better], dim=-1)

    # int16 is several times faster than wider counts, and a count is at most S.
    arrived = (arrivals[..., None, :] > candidates[..., :, None]).cumsum(-1, dtype=torch.int16)  # [..., T, K, S]
    deadly = (window - better).clamp(max=segment + 1).to(torch.int16)
    survived = torch.searchsorted(arrived, deadly[..., None], out_int32=True).squeeze(-1)  # [..., T, K]

    start = torch.arange(0, arrivals.shape[-2] * segment, segment, dtype=torch.int32, device=worst.device)
    dies = (survived < segment) & (candidates >= 0)
    death = torch.where(dies, start[:, None] + survived, length).flatten(-2)
    deaths = torch.full_like(keys.order, length)
    deaths = deaths.scatter_reduce_(-1, keys.key_of(candidates.flatten(-2)), death, "amin")
    return torch.maximum(deaths, torch.arange(length, dtype=torch.int32, device=deaths.device))


def sorted_keys(ranks: Tensor, runs: Tensor | None = None, padding: Tensor | None = None) -> Tensor:
    """Positions of keys with int64 ranks, sorted by (document, rank, position), the lowest first; padding comes first.

    A rank takes all 64 bits, so the document's number does not fit above it. Instead, a second, stable sort puts the
    documents in order and keeps the order of the keys within each.

    Returns:
        int64 `[B, G, N]`.
    """
    key = ranks.sort(dim=-1, stable=True).indices
    if padding is not None:
        group = (torch.zeros_like(padding, dtype=torch.int64) if runs is None else runs).masked_fill(padding, -1)
    elif runs is not None:
        group = runs
    else:
        return key
    group = group.to(torch.int16 if ranks.shape[-1] <= 1 << 15 else torch.int32)  # fewer bits sort faster
    by_rank = group[:, None].expand_as(key).gather(-1, key)
    return key.gather(-1, by_rank.sort(dim=-1, stable=True).indices)


def key_priorities(ranks: Tensor, runs: Tensor | None = None, padding: Tensor | None = None) -> Tensor:
    """Integers that order keys with floating ranks by document, then rank; arguments as in `deaths_by_rank`.

    Returns:
        `[B, G, N]`: int32 of at most 25 bits with sign, or int64 with the number of the document above these bits. A
        padded key has `LOWEST_PRIORITY`.
    """
    priority = ordered_bits(ranks) >> (32 - RANK_BITS)
    if runs is not None:
        priority = (runs[:, None].long() << RANK_BITS) + priority
    return priority if padding is None else priority.masked_fill(padding[:, None], LOWEST_PRIORITY)
