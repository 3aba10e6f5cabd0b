"""Triton kernels behind `block_tables`: one pass over the keys, and one over the blocks.

The first launch writes a code for each pair of a block of queries and a block of keys: 0 empty, 1 partial, 2 full. The
second orders the codes of each row and each column into FlexAttention's tables, once per query head. There are no
atomics on global memory, no sorting, and no waiting for the device.

B batch, H query heads, G KV heads, K keys, C blocks of keys, Q blocks of queries.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_THREADS = 128  # threads of a program; a tile with fewer elements would be held by several threads at once
_TILE = 1024  # elements that a program handles at a time
# Compiled once for all lengths and strides: no kernel is faster if one of them is known to be 1 or a multiple of 16.
_SIZES = [
    *("heads", "keys", "key_blocks", "q_len", "q_blocks", "q_tiles", "group"),
    *("birth_b", "birth_g", "birth_k", "death_b", "death_g", "death_k"),
]


@triton.jit
def _steps_in_window(b_block, m_b, BLOCK_Q: tl.constexpr):
    """How often each of 0, 1, ..., BLOCK_Q - 1 occurs among the block numbers; other numbers are ignored."""
    return tl.histogram(b_block, BLOCK_Q, mask=m_b & (b_block >= 0) & (b_block < BLOCK_Q))


@triton.jit(do_not_specialize=_SIZES)
def _classify_kernel(
    p_birth, p_death, p_code, heads, keys, key_blocks, q_len, q_blocks,
    birth_b, birth_g, birth_k, death_b, death_g, death_k,
    BITS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Write the codes of one block of keys, as `classify_blocks` finds them."""
    i_row = tl.program_id(0).to(tl.int64)  # batch, head and block of keys together
    i_head, first_key = i_row // key_blocks, i_row % key_blocks << BITS
    behind_keys = first_key + (1 << BITS)
    p_birth += i_head // heads * birth_b + i_head % heads * birth_g
    p_death += i_head // heads * death_b + i_head % heads * death_g
    # A block that reaches beyond the last key is never full.
    full_from, full_to = tl.full([], 0, tl.int32), tl.where(behind_keys > keys, 0, q_blocks).to(tl.int32)
    touching = tl.full([], 0, tl.int32)  # keys that touch both the last block of queries so far and the next
    for start in range(0, q_blocks, BLOCK_Q):
        b_steps = tl.zeros([BLOCK_Q], tl.int32)
        for i_k in range(first_key, tl.minimum(behind_keys, keys), BLOCK_K):
            o_k = i_k + tl.arange(0, BLOCK_K)
            m_k = o_k < tl.minimum(behind_keys, keys)
            b_birth = tl.load(p_birth + o_k * birth_k, mask=m_k, other=0)  # [BLOCK_K]
            b_death = tl.load(p_death + o_k * death_k, mask=m_k, other=q_len)
            b_birth = tl.minimum(tl.maximum(b_birth, 0), q_len).to(tl.int32)
            b_death = tl.minimum(tl.maximum(b_death, 0), q_len).to(tl.int32)
            full_from = tl.maximum(full_from, tl.max((b_birth - 1 >> BITS) + 1))
            full_to = tl.minimum(full_to, tl.min(b_death >> BITS))
            # +1 at the first block that a key touches, -1 after the last, to be summed along the queries.
            m_lives = m_k & (b_death > b_birth)
            b_steps += _steps_in_window((b_birth >> BITS) - start, m_lives, BLOCK_Q)
            b_steps -= _steps_in_window((b_death - 1 >> BITS) + 1 - start, m_lives, BLOCK_Q)
        b_touched = touching + tl.cumsum(b_steps, 0) > 0  # [BLOCK_Q]
        touching += tl.sum(b_steps)
        o_q = start + tl.arange(0, BLOCK_Q)
        b_code = tl.where((full_from <= o_q) & (o_q < full_to), 2, b_touched.to(tl.int32))
        tl.store(p_code + i_row * q_blocks + o_q, b_code.to(tl.uint8), mask=o_q < q_blocks)


@triton.jit
def _load_kind(p_rows, m_r, o_c, columns, stride_c, KIND: tl.constexpr):
    """1 where the code of a block is KIND, else 0, `[BLOCK_R, BLOCK_C]`."""
    m_code = m_r[:, None] & (o_c < columns)[None, :]
    b_code = tl.load(p_rows[:, None] + o_c.to(tl.int64)[None, :] * stride_c, mask=m_code, other=0)
    return (b_code == KIND).to(tl.int32)


@triton.jit
def _order_rows(
    p_code, p_count, p_index, i_tile, rows, columns, stride_r, stride_c, group,
    KIND: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Count the blocks of one kind in each row, and store the indices of these blocks, followed by the others."""
    i_head = i_tile // tl.cdiv(rows, BLOCK_R)
    o_r = i_tile % tl.cdiv(rows, BLOCK_R) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < rows
    p_rows = p_code + i_head * rows * columns + o_r * stride_r
    b_count, b_before = tl.zeros([BLOCK_R], tl.int32), tl.zeros([BLOCK_R], tl.int32)
    for start in range(0, columns, BLOCK_C):
        b_count += tl.sum(_load_kind(p_rows, m_r, start + tl.arange(0, BLOCK_C), columns, stride_c, KIND), 1)
    for i in range(group):
        tl.store(p_count + (i_head * group + i) * rows + o_r, b_count, mask=m_r)
    for start in range(0, columns, BLOCK_C):
        o_c = start + tl.arange(0, BLOCK_C)
        b_kind = _load_kind(p_rows, m_r, o_c, columns, stride_c, KIND)  # [BLOCK_R, BLOCK_C]
        b_seen = b_before[:, None] + tl.cumsum(b_kind, 1)  # blocks of the kind up to this one, itself included
        b_place = tl.where(b_kind == 1, b_seen - 1, b_count[:, None] + o_c[None, :] - b_seen)
        b_number = tl.broadcast_to(o_c[None, :], BLOCK_R, BLOCK_C)
        m_index = m_r[:, None] & (o_c < columns)[None, :]
        for i in range(group):
            o_index = ((i_head * group + i) * rows + o_r)[:, None] * columns + b_place
            tl.store(p_index + o_index, b_number, mask=m_index)
        b_before += tl.sum(b_kind, 1)


@triton.jit(do_not_specialize=_SIZES)
def _order_kernel(
    p_code, p_kv_count, p_kv, p_full_kv_count, p_full_kv, p_q_count, p_q, p_full_q_count, p_full_q,
    q_tiles, q_blocks, key_blocks, group,
    BLOCK_QR: tl.constexpr, BLOCK_QC: tl.constexpr, BLOCK_KR: tl.constexpr, BLOCK_KC: tl.constexpr,
):  # fmt: skip
    """Order the blocks of keys for some blocks of queries; in the later programs, the other way around."""
    i_tile = tl.program_id(0).to(tl.int64)
    if i_tile < q_tiles:
        _order_rows(p_code, p_kv_count, p_kv, i_tile, q_blocks, key_blocks, 1, q_blocks, group,
                    1, BLOCK_QR, BLOCK_QC)  # fmt: skip
        _order_rows(p_code, p_full_kv_count, p_full_kv, i_tile, q_blocks, key_blocks, 1, q_blocks, group,
                    2, BLOCK_QR, BLOCK_QC)  # fmt: skip
    else:
        _order_rows(p_code, p_q_count, p_q, i_tile - q_tiles, key_blocks, q_blocks, q_blocks, 1, group,
                    1, BLOCK_KR, BLOCK_KC)  # fmt: skip
        _order_rows(p_code, p_full_q_count, p_full_q, i_tile - q_tiles, key_blocks, q_blocks, q_blocks, 1, group,
                    2, BLOCK_KR, BLOCK_KC)  # fmt: skip


def launch_block_tables(birth: Tensor, death: Tensor, tables: list[Tensor], *, q_len: int, block_size: int) -> None:
    """Write the `block_tables` of int32 lifetimes `[B, G, K]` into `tables`, made by `empty_tables`."""
    (batch, heads, keys), (q_blocks, key_blocks) = death.shape, tables[1].shape[2:]
    code = torch.empty(batch, heads, key_blocks, q_blocks, dtype=torch.uint8, device=death.device)
    if not code.numel():
        return
    _classify_kernel[batch * heads * key_blocks,](
        birth, death, code, heads, keys, key_blocks, q_len, q_blocks, *birth.stride(), *death.stride(),
        BITS=block_size.bit_length() - 1,
        BLOCK_K=min(max(block_size, _THREADS), _TILE),
        BLOCK_Q=min(max(triton.next_power_of_2(q_blocks), 32), _TILE),
    )  # fmt: skip
    (q_rows, q_columns), (key_rows, key_columns) = _tile(key_blocks), _tile(q_blocks)
    q_tiles, key_tiles = (batch * heads * triton.cdiv(*x) for x in ((q_blocks, q_rows), (key_blocks, key_rows)))
    _order_kernel[q_tiles + key_tiles,](
        code, *tables, q_tiles, q_blocks, key_blocks, tables[0].shape[1] // heads,
        BLOCK_QR=q_rows, BLOCK_QC=q_columns, BLOCK_KR=key_rows, BLOCK_KC=key_columns,
    )  # fmt: skip


def _tile(columns: int) -> tuple[int, int]:
    """Rows and columns of a tile; longer rows take several tiles."""
    width = min(max(triton.next_power_of_2(columns), 16), 256)
    return _TILE // width, width
