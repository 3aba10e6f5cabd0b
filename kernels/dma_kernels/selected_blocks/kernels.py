"""Triton kernels behind `attention.py`.

Row r of a tile (see `tiles.py`) is query r // R of the tile, in head r % R. A tile passes over its entries. For the
gradients of keys and values, programs pass over the entries of a block instead. The entries of a block that many tiles
have chosen are divided into chunks, and the sums of the chunks are added up afterward, in order. There are no atomics,
so every run gives the same bits.

B batch, G KV heads, R query heads of a KV head, N length, D head dim, S tokens of a block, T tiles, E entries of a
tile, Z = B * G.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dma_kernels.primitives import (
    add_values,
    float32_precision,
    log_sum_exp,
    normalized,
    online_softmax_step,
    padded_head_dim,
    row_pointers,
    scaled_products,
)
from dma_kernels.selected_blocks.tiles import ROWS, Tiles, find_choosers

_SIZES = ("kv_heads", "group", "length", "entries", "blocks", "chunks")


@triton.jit
def _visible(b_bits, b_query, b_first, o_key, p_padding, length, QUERIES: tl.constexpr):
    """Which keys rows see, [rows, keys]: chosen, in their own document, not after the query, not padded."""
    visible = (((b_bits >> (b_query % QUERIES)) & 1) != 0)[:, None] & (o_key[None, :] <= b_query[:, None])
    visible &= (o_key[None, :] >= b_first[:, None]) & (b_query < length)[:, None]
    if p_padding is not None:
        visible &= (tl.load(p_padding + o_key, mask=o_key < length, other=1) == 0)[None, :]
    return visible


@triton.jit
def _load_queries(
    p_q, p_first, q_b, q_h, q_n, kv_heads, group, length,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """A program's sequence, KV head and line of entries; and of each row: line, query, first position, q and masks."""
    i_tile, i_g, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_m, o_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    b_query, b_head = i_tile * QUERIES + o_m // group, i_g * group + o_m % group
    m_m = (o_m < QUERIES * group) & (b_query < length)
    m_q = m_m[:, None] & (o_d < D)[None, :]
    b_q = tl.load(row_pointers(p_q, i_b, b_head, b_query, q_b, q_h, q_n, BLOCK_D), mask=m_q, other=0.0)
    b_first = tl.load(p_first + i_b * length + b_query, mask=m_m, other=0)
    i_line = (i_b * kv_heads + i_g) * tl.num_programs(0) + i_tile
    return i_b, i_g, i_line, (i_b * kv_heads * group + b_head) * length + b_query, b_query, b_first, b_q, m_m, m_q


@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    p_q, p_k, p_v, p_block, p_bits, p_count, p_first, p_padding, p_out, p_lse,
    q_b, q_h, q_n, k_b, k_g, k_n, v_b, v_g, v_n, kv_heads, group, length, entries, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, S: tl.constexpr, QUERIES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of one tile of queries."""
    i_b, i_g, i_line, o_line, b_query, b_first, b_q, m_m, m_q = _load_queries(
        p_q, p_first, q_b, q_h, q_n, kv_heads, group, length, D, BLOCK_D, BLOCK_M, QUERIES
    )  # fmt: skip
    o_d, o_s, m_d = tl.arange(0, BLOCK_D), tl.arange(0, S), tl.arange(0, BLOCK_D) < D
    p_k, p_v = p_k + i_b * k_b + i_g.to(tl.int64) * k_g, p_v + i_b * v_b + i_g.to(tl.int64) * v_g
    p_block, p_bits = p_block + i_line * entries, p_bits + i_line * entries
    if p_padding is not None:
        p_padding += i_b * length

    b_out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_max, b_sum = tl.full([BLOCK_M], -float("inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for i in range(tl.load(p_count + i_line)):
        o_key = tl.load(p_block + i) * S + o_s
        m_k = (o_key < length)[:, None] & m_d[None, :]
        b_k = tl.load(p_k + o_key.to(tl.int64)[:, None] * k_n + o_d[None, :], mask=m_k, other=0.0)
        b_logits = scaled_products(b_q, b_k, scale, PRECISION)
        visible = _visible(tl.load(p_bits + i), b_query, b_first, o_key, p_padding, length, QUERIES)
        b_logits = tl.where(visible, b_logits, -float("inf"))
        b_p, b_decay, b_max, b_sum = online_softmax_step(b_max, b_sum, b_logits)
        b_v = tl.load(p_v + o_key.to(tl.int64)[:, None] * v_n + o_d[None, :], mask=m_k, other=0.0)
        b_out = add_values(b_out, b_p, b_decay, b_v, PRECISION)
    b_out = normalized(b_out, b_sum)
    tl.store(p_out + o_line[:, None] * D + o_d[None, :], b_out.to(p_out.dtype.element_ty), mask=m_q)
    tl.store(p_lse + o_line, log_sum_exp(b_max, b_sum), mask=m_m)


@triton.jit(do_not_specialize=_SIZES)
def _query_gradients_kernel(
    p_q, p_k, p_v, p_block, p_bits, p_count, p_first, p_padding, p_out, p_lse, p_grad, p_dq, p_delta,
    q_b, q_h, q_n, k_b, k_g, k_n, v_b, v_g, v_n, kv_heads, group, length, entries, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, S: tl.constexpr, QUERIES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of queries, and rowsum(dO · O)."""
    i_b, i_g, i_line, o_line, b_query, b_first, b_q, m_m, m_q = _load_queries(
        p_q, p_first, q_b, q_h, q_n, kv_heads, group, length, D, BLOCK_D, BLOCK_M, QUERIES
    )  # fmt: skip
    o_d, o_s, m_d = tl.arange(0, BLOCK_D), tl.arange(0, S), tl.arange(0, BLOCK_D) < D
    p_k, p_v = p_k + i_b * k_b + i_g.to(tl.int64) * k_g, p_v + i_b * v_b + i_g.to(tl.int64) * v_g
    p_block, p_bits = p_block + i_line * entries, p_bits + i_line * entries
    if p_padding is not None:
        p_padding += i_b * length
    b_grad = tl.load(p_grad + o_line[:, None] * D + o_d[None, :], mask=m_q, other=0.0)
    b_out = tl.load(p_out + o_line[:, None] * D + o_d[None, :], mask=m_q, other=0.0)
    b_delta = tl.sum(b_grad.to(tl.float32) * b_out.to(tl.float32), axis=1)
    b_lse = tl.load(p_lse + o_line, mask=m_m, other=0.0)

    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i in range(tl.load(p_count + i_line)):
        o_key = tl.load(p_block + i) * S + o_s
        m_k = (o_key < length)[:, None] & m_d[None, :]
        b_k = tl.load(p_k + o_key.to(tl.int64)[:, None] * k_n + o_d[None, :], mask=m_k, other=0.0)
        b_logits = scaled_products(b_q, b_k, scale, PRECISION)
        visible = _visible(tl.load(p_bits + i), b_query, b_first, o_key, p_padding, length, QUERIES)
        b_p = tl.where(visible, tl.exp2(b_logits - b_lse[:, None]), 0.0)
        b_v = tl.load(p_v + o_key.to(tl.int64)[:, None] * v_n + o_d[None, :], mask=m_k, other=0.0)
        b_ds = b_p * (tl.dot(b_grad, tl.trans(b_v), input_precision=PRECISION) - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    tl.store(p_dq + o_line[:, None] * D + o_d[None, :], (b_dq * scale).to(p_dq.dtype.element_ty), mask=m_q)
    tl.store(p_delta + o_line, b_delta, mask=m_m)


@triton.jit(do_not_specialize=_SIZES)
def _key_gradients_kernel(
    p_q, p_k, p_v, p_tile, p_bits, p_chunk_block, p_chunk_start, p_chunk_end, p_first, p_padding, p_lse, p_delta,
    p_grad, p_dk, p_dv, q_b, q_h, q_n, k_b, k_g, k_n, v_b, v_g, v_n,
    kv_heads, group, length, entries, blocks, chunks, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, S: tl.constexpr, QUERIES: tl.constexpr,
    TILES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one chunk of a block's tiles adds to the gradients of the block's keys and values."""
    i_chunk, i_g, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_z = i_b * kv_heads + i_g
    i_line = i_z * chunks + i_chunk
    i_block = tl.load(p_chunk_block + i_line)
    if i_block < blocks:
        o_m, o_d, o_s = tl.arange(0, TILES * BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, S)
        o_row, m_d = o_m % BLOCK_M, o_d < D
        b_head = i_g * group + o_row % group
        p_tile, p_bits = p_tile + i_z * entries, p_bits + i_z * entries
        o_key = i_block * S + o_s
        m_k = (o_key < length)[:, None] & m_d[None, :]
        o_k = o_key.to(tl.int64)[:, None]
        b_k = tl.load(p_k + i_b * k_b + i_g.to(tl.int64) * k_g + o_k * k_n + o_d[None, :], mask=m_k, other=0.0)
        b_v = tl.load(p_v + i_b * v_b + i_g.to(tl.int64) * v_g + o_k * v_n + o_d[None, :], mask=m_k, other=0.0)
        if p_padding is not None:
            p_padding += i_b * length
        b_dk, b_dv = tl.zeros([S, BLOCK_D], tl.float32), tl.zeros([S, BLOCK_D], tl.float32)
        end = tl.load(p_chunk_end + i_line)
        for i in range(tl.load(p_chunk_start + i_line), end, TILES):
            o_e = i + o_m // BLOCK_M
            b_tile = tl.load(p_tile + o_e, mask=o_e < end, other=0)
            b_bits = tl.load(p_bits + o_e, mask=o_e < end, other=0)
            b_query = b_tile * QUERIES + o_row // group
            m_m = (o_row < QUERIES * group) & (b_query < length) & (o_e < end)
            m_q = m_m[:, None] & m_d[None, :]
            p_rows = row_pointers(p_q, i_b, b_head, b_query, q_b, q_h, q_n, BLOCK_D)
            o_line = (i_b * kv_heads * group + b_head) * length + b_query
            b_q = tl.load(p_rows, mask=m_q, other=0.0)
            b_grad = tl.load(p_grad + o_line[:, None] * D + o_d[None, :], mask=m_q, other=0.0)
            b_first = tl.load(p_first + i_b * length + b_query, mask=m_m, other=0)
            b_lse = tl.load(p_lse + o_line, mask=m_m, other=0.0)
            b_delta = tl.load(p_delta + o_line, mask=m_m, other=0.0)
            visible = _visible(b_bits, b_query, b_first, o_key, p_padding, length, QUERIES) & m_m[:, None]
            b_logits = scaled_products(b_q, b_k, scale, PRECISION)
            b_p = tl.where(visible, tl.exp2(b_logits - b_lse[:, None]), 0.0)  # [rows, S]
            b_dv = tl.dot(tl.trans(b_p.to(b_grad.dtype)), b_grad, b_dv, input_precision=PRECISION)
            b_ds = b_p * (tl.dot(b_grad, tl.trans(b_v), input_precision=PRECISION) - b_delta[:, None])
            b_dk = tl.dot(tl.trans(b_ds.to(b_q.dtype)), b_q, b_dk, input_precision=PRECISION)
        o_out = (i_line * S + o_s)[:, None] * D + o_d[None, :]
        tl.store(p_dk + o_out, b_dk * scale, mask=m_d[None, :])
        tl.store(p_dv + o_out, b_dv, mask=m_d[None, :])


@triton.jit(do_not_specialize=_SIZES)
def _add_chunks_kernel(
    p_part, p_first_chunk, p_out, length, blocks, chunks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Sum the chunks of one block, in order; zeros if no query has chosen it."""
    i_block, i_z = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_s, o_d = tl.arange(0, S), tl.arange(0, BLOCK_D)
    m_d, o_key = (o_d < D)[None, :], i_block * S + o_s
    p_first_chunk += i_z * (blocks + 1) + i_block
    b_sum = tl.zeros([S, BLOCK_D], tl.float32)
    for i in range(tl.load(p_first_chunk), tl.load(p_first_chunk + 1)):
        b_sum += tl.load(p_part + ((i_z * chunks + i) * S + o_s)[:, None] * D + o_d[None, :], mask=m_d, other=0.0)
    p_tile = p_out + (i_z * length + o_key)[:, None] * D + o_d[None, :]
    tl.store(p_tile, b_sum.to(p_out.dtype.element_ty), mask=(o_key < length)[:, None] & m_d)


def launch_attend_blocks(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, first: Tensor, padding: Tensor | None, *, block_size: int
) -> tuple[Tensor, Tensor]:
    """Output `[B, H, N, D]` and log-sum-exp in base 2, float32 `[B, H, N]`. Arguments as in `block_attention`."""
    q, k, v = (_lines(x) for x in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    _forward_kernel[_grid(tiles, k)](
        q, k, v, tiles.block, tiles.bits, tiles.count, first.contiguous(), _bytes(padding), out, lse,
        *_numbers(q, k, v, tiles), **_constants(q, k, tiles, block_size), num_warps=4, num_stages=2,
    )  # fmt: skip
    return out, lse


def launch_attend_blocks_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Tiles,
    first: Tensor,
    padding: Tensor | None,
    lse: Tensor,
    out: Tensor,
    grad_out: Tensor,
    *,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    q, k, v = (_lines(x) for x in (q, k, v))
    grad_out, first, padding = grad_out.contiguous(), first.contiguous(), _bytes(padding)
    number = triton.cdiv(k.shape[2], block_size)
    numbers, constants = _numbers(q, k, v, tiles), _constants(q, k, tiles, block_size)
    dq, delta = torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty_like(lse)
    _query_gradients_kernel[_grid(tiles, k)](
        q, k, v, tiles.block, tiles.bits, tiles.count, first, padding, out, lse, grad_out, dq, delta,
        *numbers, **constants, num_warps=4, num_stages=2,
    )  # fmt: skip

    choosers = find_choosers(tiles, number)
    batch, kv_heads, length, head_dim = k.shape
    chunks, entries = choosers.chunk_block.shape[1], choosers.tile.shape[1]
    parts = torch.empty((2, batch * kv_heads, chunks, block_size, head_dim), dtype=torch.float32, device=q.device)
    *strides_and_sizes, _, scale = numbers
    _key_gradients_kernel[chunks, kv_heads, batch](
        q, k, v, choosers.tile, choosers.bits, choosers.chunk_block, choosers.chunk_start, choosers.chunk_end,
        first, padding, lse, delta, grad_out, parts[0], parts[1], *strides_and_sizes, entries, number, chunks, scale,
        **constants, TILES=max(1, 64 // constants["BLOCK_M"]), num_warps=4, num_stages=2,
    )  # fmt: skip
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    for part, gradient in zip(parts, (dk, dv), strict=True):
        _add_chunks_kernel[number, batch * kv_heads](
            part, choosers.first_chunk, gradient, length, number, chunks,
            D=head_dim, BLOCK_D=constants["BLOCK_D"], S=block_size,
        )  # fmt: skip
    return dq, dk, dv


def _lines(x: Tensor) -> Tensor:
    """`x`, or a copy if its channels are not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _bytes(padding: Tensor | None) -> Tensor | None:
    return None if padding is None else padding.contiguous().view(torch.int8)


def _grid(tiles: Tiles, k: Tensor) -> tuple[int, int, int]:
    return tiles.block.shape[1], k.shape[1], k.shape[0]


def _numbers(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles) -> tuple[int | float, ...]:
    """Strides and sizes that the kernels with one program per tile take."""
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    return (*strides, k.shape[1], q.shape[1] // k.shape[1], k.shape[2], tiles.block.shape[2], q.shape[-1] ** -0.5)


def _constants(q: Tensor, k: Tensor, tiles: Tiles, block_size: int) -> dict[str, int | str]:
    """Values that the kernels are compiled for."""
    head_dim, group = q.shape[-1], q.shape[1] // k.shape[1]
    return {
        "D": head_dim,
        "BLOCK_D": padded_head_dim(head_dim),
        "BLOCK_M": max(ROWS, triton.next_power_of_2(tiles.queries * group)),
        "S": block_size,
        "QUERIES": tiles.queries,
        "PRECISION": float32_precision(),
    }
