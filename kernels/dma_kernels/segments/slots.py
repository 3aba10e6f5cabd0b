"""Which row of keys stands in which slot of which segment, and when it is seen there: one operation.

What `SegmentLayout` says, with segments as batch, as an operation that is opaque to torch.compile; on CUDA by Triton
kernels.

B batch, G KV heads, N length, T segments, S segment length, C snapshot slots, K = C + S slots, Z = B * T.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dma_kernels.launching import register_launch
from dma_kernels.lifetimes import Lifetimes
from dma_kernels.segments.gather import Copies
from dma_kernels.segments.plain import SegmentLayout


@dataclass(frozen=True)
class SegmentSlots:
    """Which key stands in which slot of which segment; valid for all tensors of one shape.

    Attributes:
        copies: which row of `[B, G, N, D]`, N filled up to whole segments, each slot holds, `[Z, G, K]`.
        birth: first query of the segment that sees a slot, counted from the segment's start, int32 `[Z, G or 1, K]`.
        death: first later query that no longer does, same shape.
        segment_length: S.
        length: N.
    """

    copies: Copies
    birth: Tensor
    death: Tensor
    segment_length: int
    length: int

    @classmethod
    def of(
        cls,
        lifetimes: Lifetimes,
        batch: int,
        num_kv_heads: int,
        segment_length: int | None = None,
        block_size: int = 128,
    ) -> "SegmentSlots":
        """Put the keys of a mask into slots, in O(N (1 + C/S)) memory.

        Args:
            lifetimes: the mask, for `batch` or 1 sequences and `num_kv_heads` or 1 heads.
            batch: B.
            num_kv_heads: G.
            segment_length: S, by default the mask's capacity; no more than the length, and rounded up to a multiple of
                the block size.
            block_size: S and the number of snapshot slots are multiples of it, and it is one of 16.

        Raises:
            ValueError: if sizes do not belong together, or a key is not born at its own position.
        """
        shape = lifetimes.death.shape
        if batch < 1 or num_kv_heads < 1 or shape[0] not in (1, batch) or shape[1] not in (1, num_kv_heads):
            raise ValueError(f"lifetimes: expected [{batch} or 1, {num_kv_heads} or 1, N], got {list(shape)}")
        if segment_length is not None and segment_length < 1:
            raise ValueError(f"segment_length: expected at least 1, got {segment_length}")
        if block_size < 16 or block_size % 16:
            raise ValueError(f"block_size: expected a multiple of 16, got {block_size}")
        lifetimes.check_segmentable()
        segment = min(lifetimes.capacity if segment_length is None else segment_length, lifetimes.length)
        segment = -(-segment // block_size) * block_size
        filled = -(-lifetimes.length // segment) * segment
        row, birth, death, first, slot = segment_slots(
            lifetimes.birth, lifetimes.death, lifetimes.capacity, batch, num_kv_heads, filled, segment, block_size
        )
        return cls(Copies(row, first, slot), birth, death, segment, lifetimes.length)

    @property
    def filled_length(self) -> int:
        """The length that sequences are filled up to, whole segments."""
        return -(-self.length // self.segment_length) * self.segment_length

    def check_fits(self, q: Tensor, k: Tensor) -> None:
        """Raise `ValueError` unless these are the slots of keys `[B, G, N, D]`."""
        segments, kv_heads = self.filled_length // self.segment_length, self.copies.row.shape[1]
        batch, device = self.birth.shape[0] // segments, self.birth.device
        if k.shape[:2] != (batch, kv_heads) or q.shape[2] != self.length or device != q.device:
            raise ValueError(
                f"slots: expected some for q {list(q.shape)} and k {list(k.shape)} on {q.device}, got those for batch "
                f"{batch}, {kv_heads} KV heads and {self.length} positions on {device}"
            )


def segment_slots_reference(
    birth: Tensor,
    death: Tensor,
    capacity: int,
    batch: int,
    num_kv_heads: int,
    length: int,
    segment_length: int,
    block_size: int,
) -> list[Tensor]:
    """`segment_slots` by `SegmentLayout`."""
    birth, death = (F.pad(x, (0, length - x.shape[-1])) for x in (birth, death.clamp(max=length)))
    lifetimes = Lifetimes(birth, death, capacity, born_at_position=True)
    layout = SegmentLayout.of(lifetimes, segment_length, block_size)
    copies, (birth, death) = layout.copies(batch, num_kv_heads), layout.local_lifetimes(batch)
    return [copies.row, birth, death, copies.first, copies.slot.clone()]  # the slots are a view


@torch.library.custom_op("dma_kernels::segment_slots", mutates_args=())
def segment_slots(
    birth: Tensor,
    death: Tensor,
    capacity: int,
    batch: int,
    num_kv_heads: int,
    length: int,
    segment_length: int,
    block_size: int,
) -> list[Tensor]:
    """Row, birth, death, first and slot of the slots of all segments.

    Args:
        birth: int32 `[B or 1, G or 1, n]`, each key's own position.
        death: int32, same shape; beyond `length` it counts as `length`.
        capacity: a bound on the keys alive at once.
        batch: B.
        num_kv_heads: G.
        length: N, a multiple of S, at least n; behind the keys that there are, none lives.
        segment_length: S, a multiple of the block size.
        block_size: C is a multiple of it.

    Returns:
        The row in each slot, int32 `[Z, G, K]`, where the slots of each row begin, `[B * G * N + 1]`, and which these
        are, `[Z * G * K]`, as in `Copies`; first query of the segment that sees a slot and first later one that no
        longer does, counted from the segment's start, `[Z, G or 1, K]`. In the order row, birth, death, first, slot.
    """
    return segment_slots_reference(birth, death, capacity, batch, num_kv_heads, length, segment_length, block_size)


@register_launch(segment_slots, without_triton=segment_slots_reference)
def _(birth: Tensor, *arguments: Any) -> list[Tensor]:  # birth is each key's own position
    from dma_kernels.segments.slot_kernels import launch_segment_slots

    return launch_segment_slots(*arguments)


segment_slots.register_fake(segment_slots_reference)  # its shapes follow from the arguments alone
