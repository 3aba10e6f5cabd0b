"""Segments as the batch of a FlexAttention call: which key stands where, and the block mask of every segment.

B batch, H query heads, G KV heads, N length, T segments, S segment length, K slots, Z = B * T.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from dma_flex.block_masks import block_tables, check_block_size, mask_of_tables
from dma_flex.mods import lifetime_mask_mod
from dma_kernels import Lifetimes
from dma_kernels.segments.gather import Copies
from dma_kernels.segments.slots import segment_slots


@dataclass(frozen=True)
class SegmentPlan:
    """Everything about a mask that attention over its segments needs; valid for all tensors of one shape.

    Attributes:
        copies: which row of k or v, filled up to `[B, G, T * S, D]`, each slot holds, `[Z, G, K]`.
        birth: first query of the segment that sees a slot, counted from the segment's start, int32 `[Z, G or 1, K]`.
        death: first later query that no longer does, same shape.
        block_mask: block mask of S queries and K slots, batch Z.
        segments: T, the segments of a sequence.
    """

    copies: Copies
    birth: Tensor
    death: Tensor
    block_mask: BlockMask
    segments: int

    @classmethod
    def of(
        cls,
        lifetimes: Lifetimes,
        batch: int,
        num_heads: int,
        num_kv_heads: int,
        segment_length: int | None = None,
        block_size: int = 128,
    ) -> "SegmentPlan":
        """Plan the attention of `[batch, num_heads, N, D]` queries over a mask.

        Args:
            lifetimes: the mask, for `batch` or 1 sequences and `num_kv_heads` or 1 heads.
            batch: B.
            num_heads: H, a multiple of `num_kv_heads`.
            num_kv_heads: G.
            segment_length: S, rounded up to a multiple of the block size; by default the mask's capacity is.
            block_size: of the block mask, a power of two.

        Raises:
            ValueError: if sizes do not belong together, or a key is not born at its own position.
        """
        check_block_size(block_size)
        if batch < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                "expected batch >= 1 and num_heads a multiple of num_kv_heads, "
                f"got {batch}, {num_heads} and {num_kv_heads}"
            )
        if lifetimes.death.shape[0] not in (1, batch) or lifetimes.death.shape[1] not in (1, num_kv_heads):
            raise ValueError(
                f"lifetimes: expected [{batch} or 1, {num_kv_heads} or 1, N], got {list(lifetimes.death.shape)}"
            )
        lifetimes.check_segmentable()
        segment, length = padded_length(lifetimes.length, lifetimes.capacity, segment_length, block_size)
        row, birth, death, first, slot, *tables = plan_segments(
            lifetimes.birth, lifetimes.death, lifetimes.capacity, batch, num_heads, num_kv_heads,
            length, segment, block_size,
        )  # fmt: skip
        mask_mod = lifetime_mask_mod(birth, death, num_heads)
        block_mask = mask_of_tables(tables, mask_mod, (segment, birth.shape[-1]), block_size)
        return cls(Copies(row, first, slot), birth, death, block_mask, length // segment)

    @property
    def segment_length(self) -> int:
        """S."""
        return self.block_mask.seq_lengths[0]

    @property
    def length(self) -> int:
        """The length that sequences are filled up to."""
        return self.segments * self.segment_length

    def check_fits(self, q: Tensor, k: Tensor) -> None:
        """Raise `ValueError` unless this is a plan for queries `[B, H, N, D]` and keys `[B, G, N, D]`."""
        batch, kv_heads = self.copies.row.shape[0] // self.segments, self.copies.row.shape[1]
        table_heads, device = self.block_mask.kv_num_blocks.shape[1], self.birth.device
        fits = k.shape[:2] == (batch, kv_heads) and table_heads in (1, q.shape[1]) and q.shape[2] <= self.length
        if not fits or device != q.device:
            raise ValueError(
                f"plan: expected one for q {list(q.shape)} and k {list(k.shape)} on {q.device}, got one for batch "
                f"{batch}, {kv_heads} KV heads, {table_heads} table heads and up to {self.length} positions on {device}"
            )

    def split_queries(self, q: Tensor) -> Tensor:
        """`[B, H, T * S, D] -> [Z, H, S, D]`, a view where strides allow it."""
        return q.unflatten(2, (self.segments, -1)).transpose(1, 2).flatten(0, 1)

    def join_queries(self, out: Tensor) -> Tensor:
        """The inverse of `split_queries`."""
        return out.unflatten(0, (-1, self.segments)).transpose(1, 2).flatten(2, 3)


def padded_length(length: int, capacity: int, segment_length: int | None, block_size: int) -> tuple[int, int]:
    """Segment length S and the length, a multiple of it, that a sequence is filled up to.

    FlexAttention is compiled for every shape, so lengths fall into few classes: powers of two up to one segment, and
    above that, numbers of segments with at most three significant bits.

    Raises:
        ValueError: if the segment length is below 1.
    """
    if segment_length is not None and segment_length < 1:
        raise ValueError(f"segment_length: expected at least 1, got {segment_length}")
    segment = _round_up(capacity if segment_length is None else segment_length, block_size)
    if length <= segment:
        segment = min(segment, max(block_size, _power_of_two(length)))
        return segment, segment
    segments = -(-length // segment)
    return segment, segment * _round_up(segments, max(1, _power_of_two(segments) // 8))


def _plan_segments(
    birth: Tensor,
    death: Tensor,
    capacity: int,
    batch: int,
    num_heads: int,
    num_kv_heads: int,
    length: int,
    segment_length: int,
    block_size: int,
) -> list[Tensor]:
    """Row, birth, death, first, slot and block tables of a `SegmentPlan`.

    One opaque operation, because what mods capture inside a compiled model must come out of one.
    """
    row, birth, death, first, slot = segment_slots(
        birth, death, capacity, batch, num_kv_heads, length, segment_length, block_size
    )
    tables = block_tables(birth, death, segment_length, block_size, num_heads)
    return [row, birth, death, first, slot, *tables]


plan_segments = torch.library.custom_op("dma_flex::plan_segments", _plan_segments, mutates_args=())
plan_segments.register_fake(_plan_segments)  # its shapes follow from the arguments alone


def _power_of_two(value: int) -> int:
    """The least power of two that is not below `value`."""
    return 1 << (value - 1).bit_length()


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
