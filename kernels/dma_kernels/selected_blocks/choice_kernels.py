"""The Triton kernel behind `choice.py`: it keeps the best blocks while it passes over the compressed keys.

A program has a tile of neighboring queries of one KV head, in all heads of the group. Its first pass over the
compressed keys gives the log-sum-exp of each row. Its second pass takes a few selection blocks at a time: it makes the
weights of the compressed blocks that overlap each of them, and sums them to importances. An importance and the number
of its block are one integer. So a program keeps only a sorted list of the best integers of each query.

Row r of a tile is query r // BLOCK_R of the tile, in head r % BLOCK_R of the group. A selection block has a line of
LINE columns, one for each compressed block that overlaps it; the others of the line are empty.

B batch, G KV heads, R query heads of a KV head, N length, D head dim, M rows of a tile, Q queries of a tile, C columns
of a tile, J selection blocks of a tile, l, s and b sizes of blocks (`grid.py`), m chosen blocks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dma_kernels.primitives import (
    finite_shift,
    float32_precision,
    log_sum_exp,
    online_softmax_step,
    padded_head_dim,
    row_pointers,
    scaled_products,
)
from dma_kernels.rank_kernels import ordered_bits
from dma_kernels.selected_blocks.grid import FORCED, NO_BLOCK, NO_RUN, BlockSizes, Seen

_FORCED, _NO_BLOCK = tl.constexpr(FORCED), tl.constexpr(NO_BLOCK)
_NO_RUN, _NO_QUERY = tl.constexpr(NO_RUN), tl.constexpr(NO_RUN - 1)  # equal to no run, and not to each other
_SIZES = ("kv_heads", "group", "length", "blocks", "chosen")
_OPTIONS = {"num_warps": 4, "num_stages": 2}
_LISTED = 2048  # maximum number of places in the lists of a tile


@triton.jit
def _logits(
    b_q, b_query, b_run, p_k, p_block_run, o_c, m_c, k_n, scale,
    L: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits of rows and compressed blocks `o_c`, [M, C]; -inf where a row does not see the block."""
    o_d = tl.arange(0, BLOCK_D)
    m_k = m_c[:, None] & (o_d < D)[None, :]
    b_k = tl.load(p_k + o_c.to(tl.int64)[:, None] * k_n + o_d[None, :], mask=m_k, other=0.0)
    b_block_run = tl.load(p_block_run + o_c, mask=m_c, other=_NO_RUN)
    visible = (b_block_run[None, :] == b_run[:, None]) & ((o_c * S + (L - 1))[None, :] <= b_query[:, None])
    return tl.where(visible, scaled_products(b_q, b_k, scale, PRECISION), -float("inf"))


@triton.jit
def _log_sum_exps(
    b_q, b_query, b_run, p_k, p_block_run, start, end, k_n, scale, C: tl.constexpr,
    L: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The first pass: log-sum-exp of each row over the compressed blocks from `start` to before `end`, [M]."""
    o_c = tl.arange(0, C)
    b_max, b_sum = tl.full([b_q.shape[0]], -float("inf"), tl.float32), tl.zeros([b_q.shape[0]], tl.float32)
    for i in range(start, end, C):
        b_logits = _logits(
            b_q, b_query, b_run, p_k, p_block_run, i + o_c, i + o_c < end, k_n, scale, L, S, D, BLOCK_D, PRECISION
        )  # fmt: skip
        _, _, b_max, b_sum = online_softmax_step(b_max, b_sum, b_logits)
    return log_sum_exp(b_max, b_sum)


@triton.jit
def _columns(i_block, C: tl.constexpr, LINE: tl.constexpr, BEFORE: tl.constexpr, STEP: tl.constexpr):
    """For lines from selection block `i_block` on: compressed block of each column, and number of shared strides."""
    o_column = tl.arange(0, C)
    o_near = o_column % LINE - BEFORE  # from the first compressed block that begins in the selection block
    b_shared = tl.minimum(o_near + BEFORE + 1, STEP) - tl.maximum(o_near, 0)
    return (i_block + o_column // LINE) * STEP + o_near, tl.maximum(b_shared, 0)


@triton.jit
def _importances(b_p, b_shared, QUERIES: tl.constexpr, LINE: tl.constexpr):
    """Importances of selection blocks, [Q, J], from the weights of columns [M, C], of which empty ones are 0.

    A NaN in a query makes all of its weights NaN, including those of empty columns. This changes nothing, since every
    block that is not forced overlaps a compressed block.
    """
    J: tl.constexpr = b_p.shape[1] // LINE
    b_group = tl.sum(tl.reshape(b_p, [QUERIES, b_p.shape[0] // QUERIES, J, LINE]), axis=1)
    return tl.sum(b_group * tl.reshape(b_shared, [1, J, LINE]), axis=2)


@triton.jit
def _orders(b_importance, o_block, b_own, b_first):
    """Integers that compare as (forced, importance, block), [Q, J]; below 0 for blocks that cannot be chosen."""
    own, first, block = b_own[:, None], b_first[:, None], o_block[None, :]
    b_bits = tl.where((block == first) | (block >= own - 1), _FORCED, ordered_bits(b_importance))
    candidate = (block <= own) & (block >= first)
    return tl.where(candidate, (b_bits.to(tl.int64) << 32) + block, _NO_BLOCK)


@triton.jit
def _keep_best(b_best, b_order):
    """The K largest of `b_best` [Q, K], in descending order, and `b_order` [Q, J], J at most K; also descending."""
    QUERIES: tl.constexpr = b_best.shape[0]
    TIMES: tl.constexpr = b_best.shape[1] // b_order.shape[1]
    b_new = tl.sort(b_order)
    if TIMES > 1:  # as long as the list, with none before the new ones
        last = (tl.arange(0, TIMES) == TIMES - 1)[None, :, None]
        b_new = tl.reshape(tl.where(last, b_new[:, None, :], _NO_BLOCK), [QUERIES, b_best.shape[1]])
    # Where one list descends and the other ascends, the larger of each pair are the best of both; a merge sorts them.
    return tl.bitonic_merge(tl.maximum(b_best, b_new), descending=True)


@triton.jit(do_not_specialize=_SIZES)
def _best_blocks_kernel(
    p_q, p_k, p_run, p_first, p_block_run, p_out, q_b, q_h, q_n, k_b, k_g, k_n,
    kv_heads, group, length, blocks, chosen, scale,
    L: tl.constexpr, S: tl.constexpr, SELECT: tl.constexpr, BEFORE: tl.constexpr, STEP: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, QUERIES: tl.constexpr,
    C: tl.constexpr, LINE: tl.constexpr, LIST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The chosen blocks of one tile of queries."""
    i_tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    i_g, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_m, o_d = tl.arange(0, QUERIES * BLOCK_R), tl.arange(0, BLOCK_D)
    o_j, o_list = tl.arange(0, C // LINE), tl.arange(0, LIST)
    b_query, b_head = i_tile * QUERIES + o_m // BLOCK_R, i_g * group + o_m % BLOCK_R
    m_m = (o_m % BLOCK_R < group) & (b_query < length)
    p_rows = row_pointers(p_q, i_b, b_head, b_query, q_b, q_h, q_n, BLOCK_D)
    b_q = tl.load(p_rows, mask=m_m[:, None] & (o_d < D)[None, :], other=0.0)
    b_run = tl.load(p_run + i_b * length + b_query, mask=m_m, other=_NO_QUERY)
    o_query = i_tile * QUERIES + tl.arange(0, QUERIES)
    b_first = tl.load(p_first + i_b * length + o_query, mask=o_query < length, other=length)
    first, last = tl.min(b_first), tl.minimum((i_tile + 1) * QUERIES, length) - 1  # positions
    p_k, p_block_run = p_k + i_b * k_b + i_g.to(tl.int64) * k_g, p_block_run + i_b * blocks

    end = tl.minimum(blocks, (last + 1 - L + S) // S)  # after the last compressed block that any row sees
    b_lse = _log_sum_exps(
        b_q, b_query, b_run, p_k, p_block_run, first // S, end, k_n, scale, C, L, S, D, BLOCK_D, PRECISION
    )  # fmt: skip

    b_best = tl.full([QUERIES, LIST], _NO_BLOCK, tl.int64)
    for i in range(first // SELECT, last // SELECT + 1, C // LINE):
        o_near, b_shared = _columns(i, C, LINE, BEFORE, STEP)
        m_c = (o_near >= 0) & (o_near < blocks) & (b_shared > 0)
        b_logits = _logits(
            b_q, b_query, b_run, p_k, p_block_run, o_near, m_c, k_n, scale, L, S, D, BLOCK_D, PRECISION
        )  # fmt: skip
        b_p = tl.exp2(b_logits - finite_shift(b_lse)[:, None])
        b_importance = _importances(b_p, b_shared, QUERIES, LINE)
        b_best = _keep_best(b_best, _orders(b_importance, i + o_j, o_query // SELECT, b_first // SELECT))

    b_block = tl.where(b_best < 0, _NO_BLOCK, b_best & 0xFFFFFFFF)
    o_out = ((i_b * kv_heads + i_g) * length + o_query)[:, None] * chosen + o_list[None, :]
    tl.store(p_out + o_out, b_block, mask=(o_query < length)[:, None] & (o_list < chosen)[None, :])


def launch_best_blocks(q: Tensor, compressed_keys: Tensor, seen: Seen, sizes: BlockSizes) -> Tensor:
    """The chosen blocks, int64 `[B, G, N, m]`. Arguments as in `choose_blocks`."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, compressed_keys))
    run, first, block_run = (x.int().contiguous() for x in seen)
    (batch, heads, length, head_dim), kv_heads, chosen = q.shape, k.shape[1], sizes.chosen(q.shape[2])
    out = torch.empty(batch, kv_heads, length, chosen, dtype=torch.int64, device=q.device)
    if not out.numel():
        return out
    constants = _constants(q, heads // kv_heads, sizes, chosen)
    _best_blocks_kernel[triton.cdiv(length, constants["QUERIES"]), kv_heads, batch](
        q, k, run, first, block_run, out, *q.stride()[:3], *k.stride()[:3],
        kv_heads, heads // kv_heads, length, k.shape[2], chosen, head_dim**-0.5, **constants, **_OPTIONS,
    )  # fmt: skip
    return out


def _constants(q: Tensor, group: int, sizes: BlockSizes, chosen: int) -> dict[str, int | str]:
    """Values that the kernel is compiled for.

    A tile has QUERIES * BLOCK_R rows, C columns in lines of LINE, and LIST places for the best blocks of a query.
    """
    head_dim, block_d = q.shape[-1], padded_head_dim(q.shape[-1])
    few = 32 if q.element_size() > 2 or block_d > 128 else 64  # rows, and columns
    line, block_r = triton.next_power_of_2(sizes.before + sizes.step), triton.next_power_of_2(group)
    columns = max(few, line)
    listed = max(columns // line, triton.next_power_of_2(chosen))
    queries = max(1, 16 // block_r, min(few // block_r, _LISTED // listed))
    tile: dict[str, int | str] = {"QUERIES": queries, "BLOCK_R": block_r, "C": columns, "LINE": line, "LIST": listed}
    grid = {"L": sizes.compress_block, "S": sizes.compress_stride, "SELECT": sizes.select_block}
    near = {"BEFORE": sizes.before, "STEP": sizes.step}
    return tile | grid | near | {"D": head_dim, "BLOCK_D": block_d, "PRECISION": float32_precision()}
