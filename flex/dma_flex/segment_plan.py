"""Segments as the batch of a FlexAttention call: which key is in which slot, and the block mask of every segment.

B batch, H query heads, G KV heads, N length, T segments, S segment length, K slots, Z = B * T.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from dma_flex.block_masks import block_tables, check_block_size, mask_of_tables
from dma_flex.mods import lifetime_mask_mod
from dma_kernels import Lifetimes, SegmentSlots
from dma_kernels.segments.fill_slots import round_up
from dma_kernels.segments.slots import check_mask_of, rounded_segment, segment_slots


@dataclass(frozen=True)
class FlexPlan:
    """Everything about a mask that attention over its segments needs; valid for all tensors of one shape.

    Attributes:
        slots: which key is in which slot, for sequences filled up to `slots.length` positions, a multiple of S.
        block_mask: block mask of S queries and K slots, with Z as its batch.
    """

    slots: SegmentSlots
    block_mask: BlockMask

    @classmethod
    def of(
        cls,
        lifetimes: Lifetimes,
        batch: int,
        num_heads: int,
        num_kv_heads: int,
        segment_length: int | None = None,
        block_size: int = 128,
    ) -> "FlexPlan":
        """Plan the attention of queries `[batch, num_heads, N, D]` with a mask.

        Args:
            lifetimes: the mask, for `batch` or 1 sequences and `num_kv_heads` or 1 heads.
            batch: B.
            num_heads: H, a multiple of `num_kv_heads`.
            num_kv_heads: G.
            segment_length: S, by default the mask's capacity; rounded up to a multiple of the block size.
            block_size: block size of the block mask, a power of two.

        Raises:
            ValueError: if sizes do not match, or a key is not born at its own position.
        """
        check_block_size(block_size)
        if batch < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                "expected batch >= 1 and num_heads a multiple of num_kv_heads, "
                f"got {batch}, {num_heads} and {num_kv_heads}"
            )
        check_mask_of(lifetimes, batch, num_kv_heads)
        segment, length = padded_length(lifetimes.length, lifetimes.capacity, segment_length, block_size)
        tensors = plan_segments(
            lifetimes.birth, lifetimes.death, lifetimes.capacity, batch, num_heads, num_kv_heads,
            length, segment, block_size,
        )  # fmt: skip
        slots, tables = SegmentSlots.of_tensors(tensors[:5], segment, length), tensors[5:]
        mask_mod = lifetime_mask_mod(slots.birth, slots.death, num_heads)
        return cls(slots, mask_of_tables(tables, mask_mod, (segment, slots.birth.shape[-1]), block_size))

    def check_fits(self, q: Tensor, k: Tensor) -> None:
        """Raise `ValueError` unless this is a plan for queries `[B, H, N, D]` and keys `[B, G, N, D]`."""
        slots, table_heads = self.slots, self.block_mask.kv_num_blocks.shape[1]
        sizes, device = (slots.batch, slots.num_kv_heads), slots.birth.device
        fits = k.shape[:2] == sizes and table_heads in (1, q.shape[1]) and q.shape[2] <= slots.length
        if not fits or device != q.device:
            raise ValueError(
                f"plan: expected one for q {list(q.shape)} and k {list(k.shape)} on {q.device}, got one for batch "
                f"{slots.batch}, {slots.num_kv_heads} KV heads, {table_heads} table heads and up to {slots.length} "
                f"positions on {device}"
            )


def padded_length(length: int, capacity: int, segment_length: int | None, block_size: int) -> tuple[int, int]:
    """Segment length S, and the multiple of S to which a sequence is filled up.

    FlexAttention is compiled for each shape, so lengths are rounded up to one of a few: powers of two up to one
    segment, and above that, numbers of segments with at most three significant bits.

    Raises:
        ValueError: if the segment length is below 1.
    """
    segment = rounded_segment(_power_of_two(length), capacity, segment_length, block_size)
    segments = max(1, -(-length // segment))
    return segment, segment * round_up(segments, max(1, _power_of_two(segments) // 8))


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
    """Row, birth, death, first, slot and block tables of a `FlexPlan`.

    It is one opaque operation, because tensors that mods capture inside a compiled model must be outputs of one.
    """
    row, birth, death, first, slot = segment_slots(
        birth, death, capacity, batch, num_kv_heads, length, segment_length, block_size
    )
    tables = block_tables(birth, death, segment_length, block_size, num_heads)
    return [row, birth, death, first, slot, *tables]


plan_segments = torch.library.custom_op("dma_flex::plan_segments", _plan_segments, mutates_args=())
plan_segments.register_fake(_plan_segments)  # its shapes depend only on the arguments


def _power_of_two(value: int) -> int:
    """The least power of two that is not below `value`."""
    return 1 << (value - 1).bit_length()
