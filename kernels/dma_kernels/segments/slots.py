"""The slots of segments: which key is in each slot, and which queries see it there.

`fill_slots.py` explains what a list of slots holds, and fills it in plain PyTorch. `segment_slots` does the same as one
operation that is opaque to torch.compile. On CUDA it runs Triton kernels.

B batch, H query heads, G KV heads, N length, D head dim, T segments, S segment length, C snapshot slots, K = C + S
slots, Z = B * T.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dma_kernels.launching import call, register_launch
from dma_kernels.lifetime_masks import Lifetimes
from dma_kernels.segments.biases import gather_biases, gather_biases_reference
from dma_kernels.segments.fill_slots import round_up, segment_slots_reference
from dma_kernels.segments.gather import Copies


@dataclass(frozen=True)
class SegmentSlots:
    """The keys in the slots of all segments; valid for all tensors of one shape.

    The segments form a batch: Z = B * T of them, each with S queries and K slots.

    Attributes:
        copies: which row of `[B, G, N, D]` each slot holds, `[Z, G, K]`; N is filled up to whole segments.
        birth: first query of the segment that sees a slot, counted from the segment's start, int32 `[Z, G or 1, K]`.
        death: first later query that no longer sees it, same shape.
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
            segment_length: S, by default the mask's capacity. It is limited to the length, and then rounded up to a
                multiple of the block size.
            block_size: S and the number of snapshot slots are multiples of it; itself a multiple of 16.

        Raises:
            ValueError: if sizes do not match, or a key is not born at its own position.
        """
        if batch < 1 or num_kv_heads < 1:
            raise ValueError(f"expected batch and num_kv_heads >= 1, got {batch} and {num_kv_heads}")
        if block_size < 16 or block_size % 16:
            raise ValueError(f"block_size: expected a multiple of 16, got {block_size}")
        return cls._filled_by(partial(call, segment_slots), lifetimes, batch, num_kv_heads, segment_length, block_size)

    @classmethod
    def plain(
        cls,
        lifetimes: Lifetimes,
        batch: int,
        num_kv_heads: int,
        segment_length: int | None = None,
        block_size: int = 1,
    ) -> "SegmentSlots":
        """`of` in plain PyTorch, on any device; it takes any block size, and its default S is at least 16.

        Raises:
            ValueError: if sizes do not match, or a key is not born at its own position.
        """
        segment = max(lifetimes.capacity, 16) if segment_length is None else segment_length
        if segment < 1 or block_size < 1:
            raise ValueError(f"expected segment_length and block_size >= 1, got {segment} and {block_size}")
        return cls._filled_by(segment_slots_reference, lifetimes, batch, num_kv_heads, segment, block_size)

    @classmethod
    def _filled_by(
        cls,
        fill_slots: Callable[..., list[Tensor]],
        lifetimes: Lifetimes,
        batch: int,
        num_kv_heads: int,
        segment_length: int | None,
        block_size: int,
    ) -> "SegmentSlots":
        check_mask_of(lifetimes, batch, num_kv_heads)
        segment = rounded_segment(lifetimes.length, lifetimes.capacity, segment_length, block_size)
        filled = round_up(lifetimes.length, segment)
        tensors = fill_slots(
            lifetimes.birth, lifetimes.death, lifetimes.capacity, batch, num_kv_heads, filled, segment, block_size
        )
        return cls.of_tensors(tensors, segment, lifetimes.length)

    @classmethod
    def of_tensors(cls, tensors: Sequence[Tensor], segment_length: int, length: int) -> "SegmentSlots":
        """Slots from the tensors that the operation `segment_slots` returns."""
        row, birth, death, first, slot = tensors
        return cls(Copies(row, first, slot), birth, death, segment_length, length)

    @property
    def segments(self) -> int:
        """T, the number of segments of a sequence."""
        return -(-self.length // self.segment_length)

    @property
    def filled_length(self) -> int:
        """T * S, the length to which sequences are filled up."""
        return self.segments * self.segment_length

    @property
    def batch(self) -> int:
        """B."""
        return self.birth.shape[0] // self.segments

    @property
    def num_kv_heads(self) -> int:
        """G."""
        return self.copies.row.shape[1]

    def check_fits(self, q: Tensor, k: Tensor) -> None:
        """Raise `ValueError` unless these are the slots of keys `[B, G, N, D]`."""
        sizes, device = (self.batch, self.num_kv_heads), self.birth.device
        if k.shape[:2] != sizes or q.shape[2] != self.length or device != q.device:
            raise ValueError(
                f"slots: expected slots for q {list(q.shape)} and k {list(k.shape)} on {q.device}, got slots for batch "
                f"{self.batch}, {self.num_kv_heads} KV heads and {self.length} positions on {device}"
            )

    def fill_up(self, x: Tensor) -> Tensor:
        """`[B, G, n, ...]`, n at most T * S, filled up with zeros to `[B, G, T * S, ...]`."""
        missing, later_dims = self.filled_length - x.shape[2], [0, 0] * (x.ndim - 3)
        return F.pad(x, (*later_dims, 0, missing)) if missing else x

    def gather(self, x: Tensor) -> Tensor:
        """Rows of `x` [B, G, N, D] in their slots, `[Z, G, K, D]`, zeros in empty slots; differentiable."""
        return self.copies.gather(self.fill_up(x))

    def gather_plain(self, x: Tensor) -> Tensor:
        """`gather` in plain PyTorch, on any device, and differentiable twice."""
        return self.copies.gather_plain(self.fill_up(x))

    def gather_biases(self, key_bias: Tensor, query_bias: Tensor | None = None) -> Tensor:
        """Saturated biases `[B, G, N]` in their slots, float32 `[Z, G, K]`, zeros in empty slots; no gradient.

        Float64 biases are rounded only after the `query_bias` of their segment's first query has been added.
        """
        return gather_biases(self.fill_up(key_bias), query_bias, self.copies.row, self.segment_length)

    def gather_biases_plain(self, key_bias: Tensor, query_bias: Tensor | None = None) -> Tensor:
        """`gather_biases` in plain PyTorch, on any device, and twice differentiable in `key_bias`."""
        return gather_biases_reference(self.fill_up(key_bias), query_bias, self.copies.row, self.segment_length)

    def split_queries(self, x: Tensor) -> Tensor:
        """`[B, H, N, D] -> [Z, H, S, D]`, the last segment filled up with zeros; a view where strides allow it."""
        return self.fill_up(x).unflatten(2, (self.segments, -1)).transpose(1, 2).flatten(0, 1)

    def join_queries(self, x: Tensor) -> Tensor:
        """The inverse of `split_queries`."""
        joined = x.unflatten(0, (-1, self.segments)).transpose(1, 2).flatten(2, 3)
        return joined if self.length == self.filled_length else joined[:, :, : self.length]

    def visible(self) -> Tensor:
        """Which query of a segment sees which slot, bool `[Z, G or 1, S, K]`."""
        query = torch.arange(self.segment_length, device=self.birth.device)[:, None]
        return (self.birth[..., None, :] <= query) & (query < self.death[..., None, :])


def check_mask_of(lifetimes: Lifetimes, batch: int, num_kv_heads: int) -> None:
    """Raise `ValueError` unless a mask fits `batch` sequences and `num_kv_heads` heads and can be cut into segments."""
    shape = lifetimes.death.shape
    if shape[0] not in (1, batch) or shape[1] not in (1, num_kv_heads):
        raise ValueError(f"lifetimes: expected [{batch} or 1, {num_kv_heads} or 1, N], got {list(shape)}")
    lifetimes.check_segmentable()


def rounded_segment(longest: int, capacity: int, segment_length: int | None, block_size: int) -> int:
    """S: `segment_length`, or by default the capacity; limited to `longest`, then rounded up to a whole block.

    Raises:
        ValueError: if the segment length is below 1.
    """
    if segment_length is not None and segment_length < 1:
        raise ValueError(f"segment_length: expected at least 1, got {segment_length}")
    return round_up(min(capacity if segment_length is None else segment_length, longest), block_size)


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
    """The slots of all segments, as the tensors row, birth, death, first and slot.

    Args:
        birth: int32 `[B or 1, G or 1, n]`, each key's own position.
        death: int32, same shape; beyond `length` it counts as `length`.
        capacity: an upper bound on the number of keys alive at once.
        batch: B.
        num_kv_heads: G.
        length: N, a multiple of S, at least n; there are no live keys from n on.
        segment_length: S, a multiple of the block size.
        block_size: C is a multiple of it.

    Returns:
        All int32: row `[Z, G, K]`, first `[B * G * N + 1]` and slot `[Z * G * K]` as in `Copies`; birth and death
        `[Z, G or 1, K]` as in `SegmentSlots`. They come in the order row, birth, death, first, slot.
    """
    return segment_slots_reference(birth, death, capacity, batch, num_kv_heads, length, segment_length, block_size)


@register_launch(segment_slots, without_triton=segment_slots_reference)
def _(
    birth: Tensor,  # each key's own position
    death: Tensor,
    capacity: int,
    batch: int,
    num_kv_heads: int,
    length: int,
    segment_length: int,
    block_size: int,
) -> list[Tensor]:
    from dma_kernels.segments.slot_kernels import launch_segment_slots

    return launch_segment_slots(
        death,
        capacity=capacity,
        batch=batch,
        num_kv_heads=num_kv_heads,
        length=length,
        segment_length=segment_length,
        block_size=block_size,
    )


segment_slots.register_fake(segment_slots_reference)  # its shapes depend only on the arguments
