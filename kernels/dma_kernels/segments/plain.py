"""Segments: the scattered live keys of a mask, gathered into dense contiguous lists.

Queries are cut into segments of S positions. Each segment has its own key list:

    slots [0, C)       snapshot: the keys alive at the segment's start, sorted by death, latest first
    slots [C, C + S)   own: the keys born in the segment that are ever alive, in time order

B batch, G KV heads, N length, D head dim, T segments, S segment length, C snapshot slots, K = C + S slots.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from dma_kernels.lifetimes import Lifetimes
from dma_kernels.segments.gather import Copies, flat_rows, gather_rows_reference, sum_copies_reference
from dma_kernels.selection.plain import KeyOrder, segment_snapshots, split_segments


@dataclass(frozen=True)
class SegmentLayout:
    """Which key stands in which slot of which segment.

    Attributes:
        key: position of the key in each slot, int64 `[B or 1, G or 1, T, K]`; -1 in an empty slot.
        birth: birth of that key, int32, same shape; N in an empty slot.
        death: death of that key, int32, same shape; 0 in an empty slot.
        segment_length: S.
        length: N.
    """

    key: Tensor
    birth: Tensor
    death: Tensor
    segment_length: int
    length: int

    @classmethod
    def of(cls, lifetimes: Lifetimes, segment_length: int | None = None, block_size: int = 1) -> "SegmentLayout":
        """Lay out the keys of a mask in O(N (1 + C/S)) memory.

        Args:
            lifetimes: the mask.
            segment_length: S; by default the capacity (with a floor of 16 positions), and never more than N.
            block_size: S and the number of snapshot slots are rounded up to a multiple of it.

        Raises:
            ValueError: if a size is below 1, a key is not born at its own position, or the capacity is too small.
        """
        lifetimes.check_segmentable()
        length = lifetimes.length
        segment = max(lifetimes.capacity, 16) if segment_length is None else segment_length
        if segment < 1 or block_size < 1:
            raise ValueError(f"expected segment_length and block_size >= 1, got {segment} and {block_size}")
        segment = _round_up(min(segment, length), block_size)
        slots = snapshot_slots(lifetimes.capacity, length, segment, block_size)
        key = torch.cat([_snapshot_keys(lifetimes, slots, segment), _own_keys(lifetimes, segment)], dim=-1)
        return cls(key, *_slot_lifetimes(lifetimes, key), segment, length)

    def visible(self) -> Tensor:
        """Which query of a segment sees which slot, bool `[B or 1, G or 1, T, S, K]`."""
        query = torch.arange(self.key.shape[-2] * self.segment_length, device=self.key.device)
        query = query.view(-1, self.segment_length, 1)  # [T, S, 1]
        return (self.birth[..., None, :] <= query) & (query < self.death[..., None, :])

    def gather(self, x: Tensor) -> Tensor:
        """Copy per-key rows into their slots, `[B, G, N, D] -> [B, G, T, K, D]`, zeros in empty slots.

        The gradient of a key is the sum over its copies, accumulated in at least float32.
        """
        key = self.key.expand(*x.shape[:2], -1, -1)
        return _GatherRows.apply(x, flat_rows(key, self.length))

    def copies(self, batch: int, num_kv_heads: int) -> Copies:
        """Which row of `[batch, num_kv_heads, N, D]` stands in each slot, with segments as batch, `[B * T, G, K]`."""
        row = flat_rows(self.key.expand(batch, num_kv_heads, -1, -1), self.length)
        # A key's copies stand in consecutive segments, the first in that of its own position.
        segment = torch.arange(self.key.shape[-2], device=row.device)[:, None]
        nth = torch.where(row < 0, 0, segment - self.key // self.segment_length)
        return Copies.of(_as_batch(row.int()), _as_batch(nth.int()), batch * num_kv_heads * self.length)

    def local_lifetimes(self, batch: int) -> tuple[Tensor, Tensor]:
        """Birth and death of each slot, counted from its segment's start, int32 `[batch * T, G or 1, K]`."""
        segment = torch.arange(self.key.shape[-2], dtype=torch.int32, device=self.key.device)[:, None]
        start = segment * self.segment_length
        birth, death = ((x - start).expand(batch, -1, -1, -1) for x in (self.birth, self.death))
        return _as_batch(birth), _as_batch(death)

    def split_queries(self, x: Tensor) -> Tensor:
        """`[..., N, D] -> [..., T, S, D]`, the last segment filled up with zeros."""
        return split_segments(x.transpose(-1, -2), self.segment_length, fill=0).movedim(-3, -1)

    def join_queries(self, x: Tensor) -> Tensor:
        """The inverse of `split_queries`: `[..., T, S, D] -> [..., N, D]`."""
        return x.flatten(-3, -2)[..., : self.length, :]


def snapshot_slots(capacity: int, length: int, segment_length: int, block_size: int) -> int:
    """C: the capacity, or how many keys precede the last segment, rounded up to a multiple of the block size."""
    return _round_up(min(capacity, (length - 1) // segment_length * segment_length), block_size)


class _GatherRows(torch.autograd.Function):
    """Rows of `x` [B, G, N, D]; the backward is one index-add, unsorted."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, row: Tensor) -> Tensor:
        ctx.save_for_backward(row)
        ctx.shape = list(x.shape)
        return gather_rows_reference(x, row)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return sum_copies_reference(grad, *ctx.saved_tensors, ctx.shape), None


def _snapshot_keys(lifetimes: Lifetimes, slots: int, segment: int) -> Tensor:
    """Keys alive at each segment's start, latest death first, int64 `[B or 1, G or 1, T, C]`; -1 is empty."""
    death = lifetimes.death
    keys = KeyOrder.of(death, excluded=death <= lifetimes.birth)
    order = segment_snapshots(keys.order, slots, segment)
    key = keys.key_of(order.flatten(-2))
    start = torch.arange(0, order.shape[-2] * segment, segment, device=death.device).repeat_interleave(slots)
    alive = (order.flatten(-2) >= 0) & (death.gather(-1, key) > start)
    return torch.where(alive, key, -1).view(order.shape)


def _own_keys(lifetimes: Lifetimes, segment: int) -> Tensor:
    """Keys born in each segment that are ever alive, in time order, int64 `[B or 1, G or 1, T, S]`; -1 is empty."""
    length = lifetimes.length
    position = torch.arange(length, device=lifetimes.death.device)
    alive = torch.where(lifetimes.death > lifetimes.birth, position, length)  # the dead sort behind all others
    own = split_segments(alive, segment, fill=length).sort(dim=-1).values
    return own.masked_fill(own == length, -1)


def _slot_lifetimes(lifetimes: Lifetimes, key: Tensor) -> tuple[Tensor, Tensor]:
    """Birth and death of the key in each slot."""
    flat = key.flatten(-2)
    birth, death = (x.gather(-1, flat.clamp(min=0)) for x in (lifetimes.birth, lifetimes.death))
    birth, death = birth.masked_fill(flat < 0, lifetimes.length), death.masked_fill(flat < 0, 0)
    return birth.view(key.shape), death.view(key.shape)


def _as_batch(x: Tensor) -> Tensor:
    """`[B, G, T, K] -> [B * T, G, K]`, contiguous."""
    return x.transpose(1, 2).flatten(0, 1).contiguous()


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
