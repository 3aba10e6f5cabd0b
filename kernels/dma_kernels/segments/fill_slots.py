"""Fills the slots of segments in plain PyTorch: turns the scattered live keys of a mask into dense lists.

Queries are cut into segments of S positions. Each segment has its own list of keys:

    slots [0, C)       snapshot: the keys alive at the segment's start, sorted by death, latest first
    slots [C, C + S)   own: the keys born in the segment that are ever alive, in time order

B batch, G KV heads, N length, D head dim, T segments, S segment length, C snapshot slots, K = C + S slots.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dma_kernels.segments.gather import Copies, flat_rows
from dma_kernels.selection.deaths import KeyOrder, segment_snapshots, split_segments


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
    """The oracle of `segment_slots`, with the same arguments and results, in O(N (1 + C/S)) memory."""
    birth, death = (F.pad(x, (0, length - x.shape[-1])) for x in (birth, death.clamp(max=length)))
    slots = snapshot_slots(capacity, length, segment_length, block_size)
    snapshot, own = _snapshot_keys(birth, death, slots, segment_length), _own_keys(birth, death, segment_length)
    key = torch.cat([snapshot, own], dim=-1)  # [B or 1, G or 1, T, K]
    birth, death = (_as_batch(x.expand(batch, -1, -1, -1)) for x in _local_lifetimes(birth, death, key, segment_length))
    copies = _copies(key.expand(batch, num_kv_heads, -1, -1), segment_length)
    return [copies.row, birth, death, copies.first, copies.slot.clone()]  # `slot` is a view


def snapshot_slots(capacity: int, length: int, segment_length: int, block_size: int) -> int:
    """C: the capacity, or the number of keys before the last segment if smaller, rounded up to a whole block."""
    return round_up(min(capacity, (length - 1) // segment_length * segment_length), block_size)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


def _snapshot_keys(birth: Tensor, death: Tensor, slots: int, segment_length: int) -> Tensor:
    """Keys alive at each segment's start, latest death first, int64 `[B or 1, G or 1, T, C]`; -1 is empty."""
    keys = KeyOrder.of(death, excluded=death <= birth)
    order = segment_snapshots(keys.order, slots, segment_length)
    key = keys.key_of(order.flatten(-2))
    start = torch.arange(0, death.shape[-1], segment_length, device=death.device).repeat_interleave(slots)
    alive = (order.flatten(-2) >= 0) & (death.gather(-1, key) > start)
    return torch.where(alive, key, -1).view(order.shape)


def _own_keys(birth: Tensor, death: Tensor, segment_length: int) -> Tensor:
    """Keys born in each segment that are ever alive, in time order, int64 `[B or 1, G or 1, T, S]`; -1 is empty."""
    length = death.shape[-1]
    position = torch.arange(length, device=death.device)
    alive = torch.where(death > birth, position, length)  # dead keys are sorted to the end
    own = split_segments(alive, segment_length, fill=length).sort(dim=-1).values
    return own.masked_fill(own == length, -1)


def _local_lifetimes(birth: Tensor, death: Tensor, key: Tensor, segment_length: int) -> tuple[Tensor, Tensor]:
    """Birth and death of the key in each slot, counted from the segment's start; no query sees an empty slot."""
    start = torch.arange(0, birth.shape[-1], segment_length, dtype=torch.int32, device=key.device)[:, None]
    flat, length = key.flatten(-2), birth.shape[-1]
    birth, death = (x.gather(-1, flat.clamp(min=0)) for x in (birth, death))
    birth, death = birth.masked_fill(flat < 0, length), death.masked_fill(flat < 0, 0)
    return birth.view(key.shape) - start, death.view(key.shape) - start


def _copies(key: Tensor, segment_length: int) -> Copies:
    """Which row of `[B, G, N, D]` is in which slot, from the key in each slot, `[B, G, T, K]`."""
    batch, kv_heads, segments, _ = key.shape
    row = flat_rows(key, segments * segment_length)
    # The copies of a key are in consecutive segments, the first in the segment of its own position.
    segment = torch.arange(segments, device=key.device)[:, None]
    nth = torch.where(row < 0, 0, segment - key // segment_length)
    return Copies.of(_as_batch(row.int()), _as_batch(nth.int()), batch * kv_heads * segments * segment_length)


def _as_batch(x: Tensor) -> Tensor:
    """`[B, G, T, K] -> [B * T, G, K]`, contiguous."""
    return x.transpose(1, 2).flatten(0, 1).contiguous()
