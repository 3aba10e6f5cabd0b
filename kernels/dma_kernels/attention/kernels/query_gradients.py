"""The Triton kernels of the gradient of the queries: a product of stored dS and keys; deterministic, no atomics.

    dq_t = scale · sum_j dS_tj k_j

The kernel of the key gradients has stored dS, keys by queries. `_list_key_tiles_kernel` lists, for each tile of
queries, the tiles of keys that its queries see. In `_query_gradients_kernel`, a program keeps the gradient of a tile of
queries of one head in registers, and loops over the tile's list.

On request, the second kernel also computes the gradient of a query bias, sum_j dS_tj, as a product of dS and ones. It
is 0 except for two rounding errors: that of O in D = rowsum(dO · O), and that of dS. The gradients of key biases
contain the first, and also the second if the kernel of the key gradients sums rounded dS (`rounded`). So if a number
is part of both a query bias and key biases, both errors cancel in its gradient.

B batch, H query heads, G KV heads, R = H / G group, N length, D head dim, S segment length, K slots, Z = B * segments,
L lists of a segment, one for each tile of queries.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dma_kernels.attention.configs import KernelConfig, kernel_config
from dma_kernels.attention.kernels.common import SIZES, ds_tiles, query_tiles, slot_block, slot_tiles
from dma_kernels.attention.kernels.key_gradients import StoredScores
from dma_kernels.attention.kernels.repeated import RepeatedKernel
from dma_kernels.primitives import float32_precision, padded_head_dim

_SLOTS_AT_ONCE = 1024
_ONES = tl.constexpr(16)  # columns of ones; tl.dot takes no fewer


class KeyTileLists(NamedTuple):
    """The tiles of keys that each tile of queries sees.

    Attributes:
        tile: numbers of these tiles, ascending, int32 `[Z, G or 1, L, K / BLOCK_K]`; undefined from `count` on.
        count: number of these tiles, int32 `[Z, G or 1, L]`.
        config: configuration of the query gradients; `rows` are the queries of a tile, and `columns` its keys.
    """

    tile: Tensor
    count: Tensor
    config: KernelConfig


@triton.jit(do_not_specialize=("length", "segments", "tiles"))
def _list_key_tiles_kernel(
    p_birth, p_death, p_tile, p_count, length, segments, segment, keys, mask_heads, tiles,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The list of one tile of queries."""
    i_mask, i_tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    i_start = i_mask // mask_heads % segments * segment
    first, end = i_tile * BLOCK_M, tl.minimum((i_tile + 1) * BLOCK_M, length - i_start)
    p_birth += i_mask.to(tl.int64) * keys
    p_death += i_mask.to(tl.int64) * keys
    p_tile += tl.program_id(0).to(tl.int64) * (keys // BLOCK_K)
    found = 0
    for i in range(0, keys // BLOCK_K, AT_ONCE):
        o_tile = i + tl.arange(0, AT_ONCE)
        o_k = o_tile[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
        b_birth = tl.load(p_birth + o_k, mask=o_k < keys, other=0)
        b_death = tl.load(p_death + o_k, mask=o_k < keys, other=0)
        seen = (b_death > b_birth) & (b_birth < end) & (b_death > first) & (first < end)
        is_listed = tl.max(seen.to(tl.int32), axis=1)
        tl.store(p_tile + found + tl.cumsum(is_listed) - 1, o_tile, mask=is_listed > 0)
        found += tl.sum(is_listed)
    tl.store(p_count + tl.program_id(0), found)


def list_key_tiles(
    birth: Tensor,
    death: Tensor,
    q: Tensor,
    segment_length: int,
    *,
    key_tile: int,
    config: KernelConfig | None = None,
) -> KeyTileLists:
    """The lists of all tiles of queries `[B, H, N, D]`; birth and death as in `launch_forward`.

    A tile of keys has `config.columns` keys, but at most `key_tile`, as many as in a tile of the key gradients.
    """
    z, mask_heads, keys = birth.shape
    config = config or kernel_config("query gradients", q, padded_head_dim(q.shape[-1]))
    config = config._replace(rows=slot_block(config.rows, segment_length), columns=min(key_tile, config.columns))
    tiles = segment_length // config.rows
    tile = torch.empty((z, mask_heads, tiles, keys // config.columns), dtype=torch.int32, device=birth.device)
    count = torch.empty((z, mask_heads, tiles), dtype=torch.int32, device=birth.device)
    _list_key_tiles_kernel[(count.numel(),)](
        birth, death, tile, count, q.shape[2], z // q.shape[0], segment_length, keys, mask_heads, tiles,
        BLOCK_M=config.rows, BLOCK_K=config.columns, AT_ONCE=max(1, _SLOTS_AT_ONCE // config.columns),
    )  # fmt: skip
    return KeyTileLists(tile, count, config)


@triton.jit(do_not_specialize=(*SIZES, "tiles", "first_line"))
def _query_gradients_kernel(
    d_ds, d_k, d_dq, p_tile, p_count, p_dbias,
    kv_heads, mask_heads, group, length, segments, segment, keys, tiles, first_line, scale,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of queries of one head, and of their biases if they need one."""
    i_line, i_tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    i_head = i_line % group
    i_line = i_line // group  # counted from first_line, with which dS begins
    i_z, i_g = (first_line + i_line) // kv_heads, (first_line + i_line) % kv_heads
    i_b, i_start = i_z // segments, i_z % segments * segment + i_tile * BLOCK_M
    i_list = (i_z * mask_heads + i_g % mask_heads) * tiles + i_tile
    p_tile += i_list.to(tl.int64) * (keys // BLOCK_K)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_dbias = tl.zeros([BLOCK_M, _ONES], dtype=tl.float32)  # its columns are all equal
    b_ones = tl.full([BLOCK_K, _ONES], 1.0, dtype=d_ds.dtype)
    i_column = i_head * segment + i_tile * BLOCK_M
    count = tl.load(p_count + i_list)
    i_next = tl.load(p_tile, mask=count > 0, other=0)
    for i in range(count):
        i_key = i_next
        i_next = tl.load(p_tile + i + 1, mask=i + 1 < count, other=0)  # early: the next loads need its address
        b_ds = d_ds.load([i_line * keys + i_key * BLOCK_K, i_column])  # [BLOCK_K, BLOCK_M]
        b_k = d_k.load([(first_line + i_line) * keys + i_key * BLOCK_K, 0])
        b_dq = tl.dot(tl.trans(b_ds), b_k, b_dq, input_precision=PRECISION)
        if p_dbias is not None:
            b_dbias = tl.dot(tl.trans(b_ds), b_ones, b_dbias, input_precision="ieee")
    i_h = i_g * group + i_head
    d_dq.store([i_b, i_h, i_start, 0], (b_dq * scale).to(d_dq.dtype).reshape([1, 1, BLOCK_M, BLOCK_D]))
    if p_dbias is not None:
        o_n = i_start + tl.arange(0, BLOCK_M)
        o_line = (i_b * kv_heads * group + i_h).to(tl.int64) * length
        tl.store(p_dbias + o_line + o_n, tl.max(b_dbias, axis=1), mask=o_n < length)


def launcher_of_query_gradients(
    k: Tensor,
    lists: KeyTileLists,
    dq: Tensor,
    *,
    scale: float,
    segment_length: int,
    dquery_bias: Tensor | None = None,
) -> Callable[[StoredScores], None]:
    """A function that launches the kernel for the lines whose dS is stored (`StoredScores`).

    Args:
        k: in segment order, contiguous, `[Z, G, K, D]`.
        lists: lists of all segments.
        dq: `[B, H, N, D]`; the kernel writes the rows of these lines.
        scale: factor of q·k.
        segment_length: S.
        dquery_bias: float32 `[B, H, N]`. If it is given, the kernel writes the sums of dS over all keys into it.
    """
    (batch, heads, length, head_dim), (z, kv_heads, keys) = dq.shape, k.shape[:3]
    block_m, block_k, warps, stages, registers = lists.config
    tiles, group, block_d = segment_length // block_m, heads // kv_heads, padded_head_dim(head_dim)
    d_k, d_dq = slot_tiles(k, block_k, block_d), query_tiles(dq, block_m, block_d)
    sizes = (kv_heads, lists.tile.shape[1], group, length, z // batch, segment_length, keys, tiles)
    constants = {"BLOCK_M": block_m, "BLOCK_K": block_k, "BLOCK_D": block_d, "PRECISION": float32_precision()}
    kernel = RepeatedKernel(_query_gradients_kernel, constants, num_warps=warps, num_stages=stages, maxnreg=registers)

    def launch(stored: StoredScores) -> None:
        d_ds = ds_tiles(stored.ds, block_k, block_m)
        tensors = (d_ds, d_k, d_dq, lists.tile, lists.count, dquery_bias)
        kernel.launch(stored.lines * group * tiles, *tensors, *sizes, stored.first_line, scale)

    return launch
