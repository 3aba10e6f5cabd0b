"""Triton kernels behind `slots.py`: two launches, one sort and one prefix sum.

All keys that are ever alive are sorted by (death, position). The keys that die after a segment's start are at the end
of this list. Of these, the keys born before the start are the segment's snapshot. Their number is known, so the program
searches this part of the list from both ends at once until it has found that many. This takes O(W) steps for a sliding
window, with or without sinks, and never more steps than there are keys that are ever alive.

B batch, G KV heads, n keys given, N length, T segments, S segment length, C snapshot slots, K = C + S slots.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dma_kernels.segments.fill_slots import snapshot_slots

_BLOCK = 1024


@triton.jit
def _prepare_keys_kernel(
    p_death, p_key, p_copies, p_own, p_first, kv_heads, mask_batch, mask_heads, given, length, segment, segments,
    bits, half, BLOCK: tl.constexpr,
):  # fmt: skip
    """For the keys of one head and segment: sort keys, numbers of copies, and how many of them are ever alive."""
    i_head, i_segment = (tl.program_id(0) // segments).to(tl.int64), tl.program_id(0) % segments
    i_b, i_g = i_head // kv_heads, i_head % kv_heads
    i_mask = i_b % mask_batch * mask_heads + i_g % mask_heads
    owns = (i_b < mask_batch) & (i_g < mask_heads)  # only one of the heads that share a mask writes
    alive = 0
    for i in range(tl.cdiv(segment, BLOCK)):
        o_s = i * BLOCK + tl.arange(0, BLOCK)
        o_j = i_segment * segment + o_s
        m_given = (o_s < segment) & (o_j < given)
        b_death = tl.minimum(tl.load(p_death + i_mask * given + o_j, mask=m_given, other=0), length)
        b_death = tl.where(b_death > o_j, b_death, 0)
        b_copies = tl.where(b_death > 0, (b_death - 1) // segment - i_segment + 1, 0)
        b_key = b_death + ((i_mask - half) << bits)
        tl.store(p_copies + i_head * length + o_j, b_copies, mask=o_s < segment)
        tl.store(p_key + i_mask * given + o_j, b_key.to(p_key.dtype.element_ty), mask=m_given & owns)
        alive += tl.sum((b_death > 0).to(tl.int32), axis=0)
    tl.store(p_own + i_mask * segments + i_segment, alive, mask=owns)
    tl.store(p_first, 0, mask=tl.program_id(0) == 0)


@triton.jit
def _count_at_most(p_sorted, value, count, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    """How many of `count` ascending numbers are at most `value`."""
    low = 0
    for i in tl.static_range(ROUNDS):
        step = BLOCK ** (ROUNDS - 1 - i)
        o_e = low + (tl.arange(0, BLOCK) + 1) * step - 1
        b_sorted = tl.load(p_sorted + o_e, mask=o_e < count, other=0)
        low += tl.sum(((o_e < count) & (b_sorted <= value)).to(tl.int32), axis=0) * step
    return low


@triton.jit
def _sum_from(p_x, first, count, BLOCK: tl.constexpr):
    """Sum of the numbers from `first` up to `count`."""
    total = 0
    for i in range(first // BLOCK, tl.cdiv(count, BLOCK)):
        o_x = i * BLOCK + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(p_x + o_x, mask=(o_x >= first) & (o_x < count), other=0), axis=0)
    return total


@triton.jit
def _store_keys(
    p_row, p_birth, p_death, p_first, p_slot, b_slot, b_position, b_death, m_slot, writes, i_base, i_line,
    i_segment, segment,
):  # fmt: skip
    """Put keys into slots of a segment. The pointers, except `p_first` and `p_slot`, are to the slots of its head."""
    start = i_segment * segment
    tl.store(p_row + b_slot, (i_base + b_position).to(tl.int32), mask=m_slot)
    tl.store(p_birth + b_slot, b_position - start, mask=m_slot & writes)
    tl.store(p_death + b_slot, b_death - start, mask=m_slot & writes)
    b_first = tl.load(p_first + i_base + b_position, mask=m_slot, other=0)
    # The copies of a key are in consecutive segments, the first in the segment of its own position.
    tl.store(p_slot + b_first + (i_segment - b_position // segment), (i_line + b_slot).to(tl.int32), mask=m_slot)


@triton.jit
def _store_empty(p_row, p_birth, p_death, first, behind, writes, start, length, BLOCK: tl.constexpr):
    """Mark the slots of a segment from `first` up to, not including, `behind` as empty."""
    for i in range(tl.cdiv(behind - first, BLOCK)):
        o_k = first + i * BLOCK + tl.arange(0, BLOCK)
        b_start = tl.zeros([BLOCK], dtype=tl.int32) + start
        tl.store(p_row + o_k, tl.full([BLOCK], -1, dtype=tl.int32), mask=o_k < behind)
        tl.store(p_birth + o_k, length - b_start, mask=(o_k < behind) & writes)
        tl.store(p_death + o_k, -b_start, mask=(o_k < behind) & writes)


@triton.jit
def _fill_slots_kernel(
    p_death, p_sorted, p_index, p_own, p_first, p_row, p_slot_birth, p_slot_death, p_slot,
    heads, kv_heads, mask_batch, mask_heads, given, length, segment, segments, slots, bits, half,
    ROUNDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All slots of one head and segment."""
    i_head, i_segment = (tl.program_id(0) // segments).to(tl.int64), tl.program_id(0) % segments
    i_b, i_g = i_head // kv_heads, i_head % kv_heads
    i_mask, writes = i_b % mask_batch * mask_heads + i_g % mask_heads, i_g < mask_heads
    i_z, keys, start = i_b * segments + i_segment, slots + segment, i_segment * segment
    i_line, i_mask_line, i_base = (i_z * kv_heads + i_g) * keys, (i_z * mask_heads + i_g) * keys, i_head * length
    p_row, p_slot_birth, p_slot_death = p_row + i_line, p_slot_birth + i_mask_line, p_slot_death + i_mask_line
    p_sorted, p_index, p_death = p_sorted + i_mask * given, p_index + i_mask * given, p_death + i_mask * given
    o_block = tl.arange(0, BLOCK)

    if slots > 0:
        offset = (i_mask - half) << bits
        later = given - _count_at_most(p_sorted, start + offset, given, ROUNDS, BLOCK)  # keys that die after the start
        alive = later - _sum_from(p_own + i_mask * segments, i_segment, segments, BLOCK)  # and are born before
        latest, earliest, i_step = 0, 0, 0  # how many keys of the snapshot have been found from either end
        while latest + earliest < alive:
            o_e = i_step * BLOCK + o_block
            for from_end in tl.static_range(2):
                o_sorted = given - 1 - o_e if from_end else given - later + o_e
                b_key = tl.load(p_index + o_sorted, mask=o_e < later, other=0) - i_mask * given
                m_old = (o_e < later) & (b_key < start)
                b_nth = tl.cumsum(m_old.to(tl.int32), axis=0) - 1
                b_slot = latest + b_nth if from_end else alive - 1 - earliest - b_nth
                m_slot = m_old & (b_slot >= 0) & (b_slot < slots)
                b_death = tl.load(p_sorted + o_sorted, mask=m_slot, other=0) - offset
                _store_keys(
                    p_row, p_slot_birth, p_slot_death, p_first, p_slot, b_slot, b_key.to(tl.int32),
                    b_death.to(tl.int32), m_slot, writes, i_base, i_line, i_segment, segment,
                )  # fmt: skip
                if from_end:
                    latest += tl.sum(m_old.to(tl.int32), axis=0)
                else:
                    earliest += tl.sum(m_old.to(tl.int32), axis=0)
            i_step += 1
        _store_empty(
            p_row, p_slot_birth, p_slot_death, tl.minimum(alive, slots), slots, writes, start, length, BLOCK
        )  # fmt: skip

    own = slots
    for i in range(tl.cdiv(segment, BLOCK)):
        o_j = start + i * BLOCK + o_block
        m_own = (o_j < start + segment) & (o_j < given)
        b_death = tl.minimum(tl.load(p_death + o_j, mask=m_own, other=0), length)
        m_own = m_own & (b_death > o_j)
        b_slot = own + tl.cumsum(m_own.to(tl.int32), axis=0) - 1
        _store_keys(
            p_row, p_slot_birth, p_slot_death, p_first, p_slot, b_slot, o_j, b_death, m_own, writes, i_base, i_line,
            i_segment, segment,
        )  # fmt: skip
        own += tl.sum(m_own.to(tl.int32), axis=0)
    _store_empty(p_row, p_slot_birth, p_slot_death, own, keys, writes, start, length, BLOCK)

    total = tl.load(p_first + heads * length)
    for i in range(tl.cdiv(keys, BLOCK)):  # -1 after the last copy; every program writes its share
        o_k = i * BLOCK + o_block
        tl.store(p_slot + i_line + o_k, tl.full([BLOCK], -1, tl.int32), mask=(o_k < keys) & (i_line + o_k >= total))


def launch_segment_slots(
    death: Tensor,
    *,
    capacity: int,
    batch: int,
    num_kv_heads: int,
    length: int,
    segment_length: int,
    block_size: int,
    block: int = _BLOCK,
) -> list[Tensor]:
    """`segment_slots`, for keys born at their own positions; a program loads `block` keys at once."""
    death = death.contiguous()
    (mask_batch, mask_heads, given), device = death.shape, death.device
    heads, segments = batch * num_kv_heads, length // segment_length
    slots = snapshot_slots(capacity, length, segment_length, block_size)
    z, keys, shape = batch * segments, slots + segment_length, (given, length, segment_length, segments)
    first = torch.empty(heads * length + 1, dtype=torch.int32, device=device)
    copies = torch.empty(heads * length, dtype=torch.int32, device=device)
    own = torch.empty(mask_batch * mask_heads, segments, dtype=torch.int32, device=device)
    row = torch.empty(z, num_kv_heads, keys, dtype=torch.int32, device=device)
    slot_birth = torch.empty(z, mask_heads, keys, dtype=torch.int32, device=device)
    slot_death = torch.empty_like(slot_birth)  # outputs of an operation must not share memory
    slot = torch.empty(z * num_kv_heads * keys, dtype=torch.int32, device=device)
    masks, bits, half = (mask_batch, mask_heads), length.bit_length(), mask_batch * mask_heads // 2
    key = torch.empty(death.numel(), dtype=_sort_dtype(mask_batch * mask_heads, bits), device=device)
    _prepare_keys_kernel[(heads * segments,)](
        death, key, copies, own, first, num_kv_heads, *masks, *shape, bits, half, BLOCK=block
    )
    torch.cumsum(copies, 0, dtype=torch.int32, out=first[1:])
    by_death, index = key.sort(stable=True) if slots else (key, key)  # of equal deaths, the later position is last
    _fill_slots_kernel[(heads * segments,)](
        death, by_death, index, own, first, row, slot_birth, slot_death, slot,
        heads, num_kv_heads, *masks, *shape, slots, bits, half, ROUNDS=_rounds(given, block), BLOCK=block, num_warps=8,
    )  # fmt: skip
    return [row, slot_birth, slot_death, first, slot]


def _sort_dtype(rows: int, bits: int) -> torch.dtype:
    """int32, which sorts in half the passes, if a row's number fits above a death of `bits` bits; otherwise int64."""
    return torch.int32 if rows << bits <= 1 << 32 else torch.int64


def _rounds(count: int, block: int) -> int:
    """The smallest number of rounds, at least 1, with `block ** rounds >= count`."""
    rounds = 1
    while block**rounds < count:
        rounds += 1
    return rounds
