"""Triton kernels behind `ops.py`: deaths of the causal top-w, by one sort and four launches around it.

Let `key[x]` be the position of the key of order x. This key dies at the position of the W-th better key,

    D(x) = the W-th smallest of { key[o] : o > x },  N if there are fewer,

or on arrival if it arrives later than that. D grows with x.

Orders are divided into blocks, and positions into bins. A table first counts the keys of each block in each bin. Then
each entry becomes the sum over its block and all blocks above it. The table gives D for the lowest and for the highest
key of each block. Between these two positions, both included, at most X keys are better than the lowest key of the
block. These keys are the candidates: the D of every other key of the block is the position of one of them. All of this
takes O(N X) comparisons, and O(N² / (X C)) memory, which the tiling limits to 4 N numbers.

R rows (batch and KV heads together), N length, W keep-window size, X orders of a block, C positions of a bin, S
positions searched at once, P candidates compared at once.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dma_kernels.rank_kernels import ordered_bits
from dma_kernels.selection.deaths import LOWEST_PRIORITY, RANK_BITS

_TABLE = (128, 32)  # blocks that a program sums at once, and bins per program
_KEYS = 1024  # sort keys that a program makes or moves
_SPLIT_ROWS = 64  # more rows are split by a sort, since a kernel reads all indices once for each row


@dataclass(frozen=True)
class Tiling:
    """Powers of two: orders of a block (X), positions of a bin (C), positions searched at once (S)."""

    block: int
    bin: int
    scan: int

    @classmethod
    def of(cls, length: int) -> "Tiling":
        """At most 1024 bins, and at most 4 N numbers in the table."""
        block = 128 if length <= 1 << 18 else 256
        return cls(block, max(128, triton.next_power_of_2(triton.cdiv(length, 4 * block))), 1024)


@triton.jit
def _sort_keys_kernel(
    p_rank, p_run, p_padding, p_key, length, heads, rows, stride_b, stride_g, stride_n, run_b, run_n, padding_b,
    padding_n, bits, BITS: tl.constexpr, LOWEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the sort keys: integers that hold row, document and rank."""
    chunks = tl.cdiv(length, BLOCK)
    i_row, o_n = tl.program_id(0) // chunks, (tl.program_id(0) % chunks * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    i_b, i_g, m_n = (i_row // heads).to(tl.int64), i_row % heads, o_n < length
    b_rank = tl.load(p_rank + i_b * stride_b + i_g * stride_g + o_n * stride_n, mask=m_n, other=0.0)
    b_key = (ordered_bits(b_rank.to(tl.float32)) >> (32 - BITS)).to(p_key.dtype.element_ty)
    if p_run is not None:
        b_key += tl.load(p_run + i_b * run_b + o_n * run_n, mask=m_n, other=0).to(tl.int64) << BITS
    if p_padding is not None:
        b_key = tl.where(tl.load(p_padding + i_b * padding_b + o_n * padding_n, mask=m_n, other=0), LOWEST, b_key)
    b_key += (i_row - rows // 2).to(b_key.dtype) << bits
    tl.store(p_key + i_row.to(tl.int64) * length + o_n, b_key, mask=m_n)


@triton.jit
def _count_rows_kernel(p_index, p_count, length, keys, blocks, BLOCK: tl.constexpr):
    """How many of a block's sorted keys belong to one row."""
    i_block, i_row, o_x = tl.program_id(0), tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_row = tl.load(p_index + o_x, mask=o_x < keys, other=-1) // length == i_row
    tl.store(p_count + i_row * blocks + i_block, tl.sum((m_row & (o_x < keys)).to(tl.int32), axis=0))


@triton.jit
def _split_rows_kernel(p_index, p_count, p_out, length, keys, blocks, BLOCK: tl.constexpr):
    """Move a block's sorted keys of one row behind that row's keys from earlier blocks."""
    i_block, i_row, o_x = tl.program_id(0), tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    before = tl.zeros([], dtype=tl.int32)
    for i in range(0, i_block, BLOCK):
        o_block = i + tl.arange(0, BLOCK)
        before += tl.sum(tl.load(p_count + i_row * blocks + o_block, mask=o_block < i_block, other=0), axis=0)
    b_index = tl.load(p_index + o_x, mask=o_x < keys, other=-1)
    m_row = (b_index // length == i_row) & (o_x < keys)
    o_out = i_row.to(tl.int64) * length + before + tl.cumsum(m_row.to(tl.int32), axis=0) - 1
    tl.store(p_out + o_out, b_index, mask=m_row)


@triton.jit
def _count_keys_kernel(
    p_index, p_order, p_count, length, blocks, bins, BINS: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """For one block of the sorted keys, write the order of each key, and count the keys in each bin of positions."""
    i_row, i_block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    o_x = i_block * BLOCK_X + tl.arange(0, BLOCK_X)
    m_x = o_x < length
    b_key = (tl.load(p_index + i_row * length + o_x, mask=m_x, other=0) - i_row * length).to(tl.int32)
    tl.store(p_order + i_row * length + b_key, o_x, mask=m_x)
    o_c = tl.arange(0, BINS)
    b_count = tl.histogram(b_key // BLOCK_C, BINS, mask=m_x)
    tl.store(p_count + (i_row * blocks + i_block) * bins + o_c, b_count, mask=o_c < bins)


@triton.jit
def _sum_blocks_kernel(p_count, blocks, bins, ROWS: tl.constexpr, BINS: tl.constexpr):
    """In each bin, add to the count of each block the counts of all blocks above it."""
    chunks = tl.cdiv(bins, BINS)
    o_c = tl.program_id(0) % chunks * BINS + tl.arange(0, BINS)
    p_count += (tl.program_id(0) // chunks).to(tl.int64) * blocks * bins
    b_above = tl.zeros([BINS], dtype=tl.int32)
    for i in range(tl.cdiv(blocks, ROWS)):
        o_r = blocks - 1 - i * ROWS - tl.arange(0, ROWS)  # downwards
        m_count = (o_r >= 0)[:, None] & (o_c < bins)[None, :]
        p_tile = p_count + o_r[:, None] * bins + o_c[None, :]
        b_count = tl.load(p_tile, mask=m_count, other=0)  # [ROWS, BINS]
        tl.store(p_tile, tl.cumsum(b_count, axis=0) + b_above[None, :], mask=m_count)
        b_above += tl.sum(b_count, axis=0)


@triton.jit
def _nth_position(b_count, p_order, least, window, length, bins, BINS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Position of the `window`-th key with an order from `least` on, or N; `b_count` counts these keys in each bin."""
    o_c = tl.arange(0, BINS)
    i_bin = tl.minimum(tl.sum((tl.cumsum(b_count, axis=0) < window).to(tl.int32), axis=0), bins - 1)
    before = tl.sum(tl.where(o_c < i_bin, b_count, 0), axis=0)
    o_p = i_bin * BLOCK_C + tl.arange(0, BLOCK_C)
    b_order = tl.load(p_order + o_p, mask=o_p < length, other=-1)
    b_seen = before + tl.cumsum((b_order >= least).to(tl.int32), axis=0)
    return tl.minimum(i_bin * BLOCK_C + tl.sum((b_seen < window).to(tl.int32), axis=0), length)


@triton.jit
def _store_candidates(
    p_order, p_line, p_candidate, lowest_key, i_block, window, length, blocks, bins,
    BINS: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Store the positions at which the keys of one block can die, ascending, with N after the last one.

    The pointers are to the orders of the row, the block's line of the table, and its candidates.
    """
    lowest, o_c = i_block * BLOCK_X, tl.arange(0, BINS)
    b_above = tl.load(p_line + bins + o_c, mask=(o_c < bins) & (i_block + 1 < blocks), other=0)
    b_better = tl.load(p_line + o_c, mask=o_c < bins, other=0) - (o_c == lowest_key // BLOCK_C).to(tl.int32)
    first = _nth_position(b_better, p_order, lowest + 1, window, length, bins, BINS, BLOCK_C)  # D of the lowest
    last = _nth_position(b_above, p_order, lowest + BLOCK_X, window, length, bins, BINS, BLOCK_C)  # D of the highest
    found = 0  # at most X: fewer than W + X keys up to `last` are better than the lowest, and W - 1 are before `first`
    for i in range(first // BLOCK_S, tl.cdiv(tl.minimum(last + 1, length), BLOCK_S)):
        o_p = i * BLOCK_S + tl.arange(0, BLOCK_S)
        m_p = (o_p >= first) & (o_p <= last) & (o_p < length)
        m_p = m_p & (tl.load(p_order + o_p, mask=m_p, other=-1) > lowest)
        tl.store(p_candidate + found + tl.cumsum(m_p.to(tl.int32), axis=0) - 1, o_p, mask=m_p)
        found += tl.sum(m_p.to(tl.int32), axis=0)
    o_k = tl.arange(0, BLOCK_X)
    tl.store(p_candidate + o_k, tl.zeros([BLOCK_X], dtype=tl.int32) + length, mask=o_k >= found)


@triton.jit
def _deaths_kernel(
    p_index, p_order, p_count, p_candidate, p_death, window, last, length, blocks, bins,
    BINS: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Deaths of the keys of one block: `last` positions after the candidate that is a key's `window`-th better key."""
    i_program = tl.program_id(0).to(tl.int64)
    i_row, i_block = i_program // blocks, tl.program_id(0) % blocks
    p_index, p_order = p_index + i_row * length, p_order + i_row * length
    p_line, p_candidate = p_count + i_program * bins, p_candidate + i_program * BLOCK_X
    o_x = i_block * BLOCK_X + tl.arange(0, BLOCK_X)
    m_x = o_x < length
    b_key = (tl.load(p_index + o_x, mask=m_x, other=0) - i_row * length).to(tl.int32)
    lowest_key = (tl.load(p_index + i_block * BLOCK_X) - i_row * length).to(tl.int32)
    _store_candidates(
        p_order, p_line, p_candidate, lowest_key, i_block, window, length, blocks, bins, BINS, BLOCK_X, BLOCK_C, BLOCK_S
    )
    tl.debug_barrier()  # threads read candidates that other threads wrote
    # W - 1 keys before the first candidate are better than the lowest of the block. Subtract those in the block itself.
    b_early = m_x & (o_x > i_block * BLOCK_X) & (b_key < tl.load(p_candidate))
    b_seen = window - 1 - tl.cumsum(b_early.to(tl.int32), axis=0)
    b_nth = tl.zeros([BLOCK_X], dtype=tl.int32)
    for i in range(BLOCK_X // BLOCK_P):
        b_position = tl.load(p_candidate + i * BLOCK_P + tl.arange(0, BLOCK_P))
        b_order = tl.load(p_order + b_position, mask=b_position < length, other=-1)
        # Candidates are along axis 0, so that each thread holds whole columns and sums them by itself.
        b_better = (b_order[:, None] > o_x[None, :]).to(tl.int32)  # [BLOCK_P, BLOCK_X]
        b_alive = b_seen[None, :] + tl.cumsum(b_better, axis=0) < window
        b_nth += tl.sum(b_alive.to(tl.int32), axis=0)
        b_seen += tl.sum(b_better, axis=0)
    b_death = tl.load(p_candidate + b_nth, mask=b_nth < BLOCK_X, other=length)
    b_death = tl.minimum(tl.maximum(b_death, b_key) + last, length)
    tl.store(p_death + i_row * length + b_key, b_death, mask=m_x)


def launch_top_w_deaths(
    ranks: Tensor,
    runs: Tensor | None,
    padding: Tensor | None,
    *,
    window: int,
    last: int = 0,
    tiling: Tiling | None = None,
) -> Tensor:
    """`deaths_by_rank`, for ranks `[B, G, N]`."""
    length, device = ranks.shape[-1], ranks.device
    if window >= length or not ranks.numel():
        return torch.full(ranks.shape, length, dtype=torch.int32, device=device)
    index = _sorted_index(ranks, runs, padding)
    tiling = tiling or Tiling.of(length)
    rows, blocks, bins = index.numel() // length, triton.cdiv(length, tiling.block), triton.cdiv(length, tiling.bin)
    order, death = (torch.empty(ranks.shape, dtype=torch.int32, device=device) for _ in range(2))
    candidate = torch.empty(rows, blocks, tiling.block, dtype=torch.int32, device=device)
    count = torch.empty(rows, blocks, bins, dtype=torch.int32, device=device)
    grid, sizes = (rows * blocks,), (length, blocks, bins)
    tiles = {"BINS": triton.next_power_of_2(bins), "BLOCK_X": tiling.block, "BLOCK_C": tiling.bin}
    _count_keys_kernel[grid](index, order, count, *sizes, **tiles)
    _sum_blocks_kernel[(rows * triton.cdiv(bins, _TABLE[1]),)](count, blocks, bins, ROWS=_TABLE[0], BINS=_TABLE[1])
    _deaths_kernel[grid](
        index, order, count, candidate, death, window, min(last, length), *sizes, **tiles,
        BLOCK_S=tiling.scan, BLOCK_P=min(tiling.block, 64), num_warps=8 if tiling.block > 128 else 4,
    )  # fmt: skip
    return death


def _sorted_index(ranks: Tensor, runs: Tensor | None, padding: Tensor | None) -> Tensor:
    """Flat indices of the keys, row after row, in sorted order within each row, int64 `[B * G * N]`."""
    if ranks.dtype != torch.int64:
        return launch_sort_keys(ranks, runs, padding).sort(stable=True).indices  # stable: of equal keys, the later wins
    return _sorted_integers(ranks, runs, padding)


def _sorted_integers(ranks: Tensor, runs: Tensor | None, padding: Tensor | None) -> Tensor:
    """`_sorted_index` of int64 ranks: one sort by rank, then one by row and document, since ranks fill all 64 bits.

    Each sorts all rows together, which takes no longer than one row alone.
    """
    batch, heads, length = ranks.shape
    index = ranks.flatten().sort(stable=True).indices
    if runs is None and padding is None and batch * heads <= _SPLIT_ROWS:
        return launch_split_rows(index, batch * heads, length)
    if runs is None and padding is None:
        group, groups = index // length, batch * heads
    else:
        number = torch.zeros_like(padding, dtype=torch.int64) if runs is None else runs.long()
        number = number if padding is None else number.masked_fill(padding, -1)
        row = torch.arange(batch * heads, device=ranks.device).view(batch, heads, 1)
        group = (row * (length + 1) + number[:, None] + 1).flatten()[index]
        groups = batch * heads * (length + 1)
    return index[group.to(_least_dtype(groups)).sort(stable=True).indices]


def launch_split_rows(index: Tensor, rows: int, length: int, block: int = _KEYS) -> Tensor:
    """Put flat indices `[rows * length]` together row by row, and keep their order within each row."""
    if rows == 1:
        return index
    out, blocks = torch.empty_like(index), triton.cdiv(index.numel(), block)
    count = torch.empty(rows, blocks, dtype=torch.int32, device=index.device)
    _count_rows_kernel[blocks, rows](index, count, length, index.numel(), blocks, BLOCK=block)
    _split_rows_kernel[blocks, rows](index, count, out, length, index.numel(), blocks, BLOCK=block)
    return out


def _least_dtype(count: int) -> torch.dtype:
    """The smallest integer type for numbers below `count`; fewer bits sort faster."""
    sizes = {torch.uint8: 8, torch.int16: 15, torch.int32: 31}
    return next((dtype for dtype, bits in sizes.items() if count <= 1 << bits), torch.int64)


def launch_sort_keys(ranks: Tensor, runs: Tensor | None = None, padding: Tensor | None = None) -> Tensor:
    """`key_priorities` of floating ranks, with the row's number in the bits above them, `[B * G * N]`.

    So one sort handles all rows, which takes no longer than one row alone.
    """
    batch, heads, length = ranks.shape
    rows = batch * heads
    # The number of the document is in the bits above the rank. Padding, with -1, needs no extra bit.
    bits = RANK_BITS if runs is None else RANK_BITS + 1 + max(7, length.bit_length())
    assert (rows + 1) << bits <= 1 << 64, f"{rows} rows of {bits} bits do not fit into 64"
    dtype = torch.int32 if runs is None and (rows + 1) << bits <= 1 << 32 else torch.int64  # 32 bits: half the passes
    key = torch.empty(rows * length, dtype=dtype, device=ranks.device)
    _sort_keys_kernel[(rows * triton.cdiv(length, _KEYS),)](
        ranks, runs, padding, key, length, heads, rows, *ranks.stride(),
        *((0, 0) if runs is None else runs.stride()), *((0, 0) if padding is None else padding.stride()), bits,
        BITS=RANK_BITS, LOWEST=LOWEST_PRIORITY, BLOCK=_KEYS,
    )  # fmt: skip
    return key
