"""Triton kernels behind `gather.py` and `biases.py`: all copy data, and are bound by memory bandwidth.

Rows are gathered by number. A row's gradient is the sum over the list of its copies: one pass without atomics or
sorting, and the same bits in every run.

B batch, G KV heads, N length, S segment length, K slots, Z = B * segments, M slots of any shape, R rows, D head dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dma_kernels.rank_kernels import saturated

_INFINITY = tl.constexpr(float("inf"))
_TILE = 1024  # elements of a program; in larger programs, more rows wait for the one with the most copies


@triton.jit
def _gather_rows_kernel(
    p_x, p_row, p_out, slots, heads, length, stride_b, stride_g, stride_n,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Copy one row per slot; zeros into empty slots."""
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    b_row = tl.load(p_row + o_m, mask=o_m < slots, other=-1)
    b_head, b_position = (b_row // length).to(tl.int64), (b_row % length).to(tl.int64)
    o_x = b_head // heads * stride_b + b_head % heads * stride_g + b_position * stride_n
    m_x = (b_row >= 0)[:, None] & (o_d < D)[None, :]
    b_x = tl.load(p_x + o_x[:, None] + o_d[None, :], mask=m_x, other=0.0)  # [BLOCK_M, BLOCK_D]
    tl.store(p_out + o_m[:, None] * D + o_d[None, :], b_x, mask=(o_m < slots)[:, None] & (o_d < D)[None, :])


@triton.jit
def _gather_biases_kernel(
    p_bias, p_query_bias, p_row, p_out, slots, heads, length, segments, segment, keys,
    bias_b, bias_g, bias_n, query_b, query_g, query_n, BLOCK_M: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """Copy one saturated bias per slot, shifted by the bias of the segment's first query; zeros into empty slots."""
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_row = tl.load(p_row + o_m, mask=o_m < slots, other=-1)
    m_row = b_row >= 0
    b_head, b_position = (b_row // length).to(tl.int64), (b_row % length).to(tl.int64)
    i_b, i_g = b_head // heads, b_head % heads
    b_bias = tl.load(p_bias + i_b * bias_b + i_g * bias_g + b_position * bias_n, mask=m_row, other=0.0)
    if SHIFTED:
        o_first = o_m // (heads * keys) % segments * segment
        b_shift = tl.load(p_query_bias + i_b * query_b + i_g * query_g + o_first * query_n, mask=m_row, other=0.0)
        b_bias += tl.where(tl.abs(b_shift) < _INFINITY, b_shift, 0.0).to(tl.float64)  # neither infinite nor NaN
    tl.store(p_out + o_m, saturated(b_bias).to(tl.float32), mask=o_m < slots)


@triton.jit
def _sum_copies_kernel(
    p_rows, p_first, p_slot, p_out, count, length, head_rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Sum the copies of each row, in order."""
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D)
    m_r, m_d = o_r < count, o_d < D
    o_row = o_r // length * head_rows + o_r % length
    b_first = tl.load(p_first + o_row, mask=m_r, other=0)
    b_copies = tl.load(p_first + o_row + 1, mask=m_r, other=0) - b_first
    b_sum = tl.zeros([BLOCK_R, BLOCK_D], dtype=WIDE)
    for i in range(tl.max(b_copies)):
        b_slot = tl.load(p_slot + b_first + i, mask=i < b_copies, other=-1)
        m_x = (b_slot >= 0)[:, None] & m_d[None, :]
        b_sum += tl.load(p_rows + b_slot.to(tl.int64)[:, None] * D + o_d[None, :], mask=m_x, other=0.0).to(WIDE)
    tl.store(p_out + o_r[:, None] * D + o_d[None, :], b_sum, mask=m_r[:, None] & m_d[None, :])


def launch_gather_rows(x: Tensor, row: Tensor, *, head_rows: int | None = None) -> Tensor:
    """`gather_rows` of `x` [B, G, N, D] by int32 `row` [M...], which counts `head_rows` >= N per head, by default N."""
    x, row = x if x.stride(-1) == 1 else x.contiguous(), row.contiguous()
    out = x.new_empty(*row.shape, x.shape[-1])
    block_d, block_m = _blocks(x.shape[-1])
    if out.numel():
        _gather_rows_kernel[triton.cdiv(row.numel(), block_m),](
            x, row, out, row.numel(), x.shape[1], head_rows or x.shape[2], *x.stride()[:3],
            D=x.shape[-1], BLOCK_D=block_d, BLOCK_M=block_m,
        )  # fmt: skip
    return out


def launch_gather_biases(key_bias: Tensor, query_bias: Tensor | None, row: Tensor, *, segment_length: int) -> Tensor:
    """`gather_biases` of `[B, G, N]` by int32 `row` [Z, G, K]; N need not be filled up to whole segments."""
    row, (batch, kv_heads, _) = row.contiguous(), key_bias.shape
    out = key_bias.new_empty(row.shape, dtype=torch.float32)
    shifted = query_bias if key_bias.dtype == torch.float64 else None
    if out.numel():
        segments = row.shape[0] // batch
        _gather_biases_kernel[triton.cdiv(row.numel(), _TILE),](
            key_bias, shifted, row, out, row.numel(), kv_heads, segments * segment_length, segments, segment_length,
            row.shape[-1], *key_bias.stride(), *((0, 0, 0) if shifted is None else shifted.stride()),
            BLOCK_M=_TILE, SHIFTED=shifted is not None,
        )  # fmt: skip
    return out


def launch_sum_copies(
    rows: Tensor,
    first: Tensor,
    slot: Tensor,
    *,
    shape: list[int],
    head_rows: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`sum_copies` of `rows` [M..., D] into `shape` [B, G, N, D]; `first` counts `head_rows` per head, by default N.

    The sums have `dtype`, by default that of the rows. They are added up in float64 if that is float64, and otherwise
    in float32.
    """
    rows, out = rows.contiguous(), rows.new_empty(shape, dtype=dtype)
    block_d, block_r = _blocks(shape[-1])
    wide = tl.float64 if out.dtype == torch.float64 else tl.float32
    if out.numel():
        count, length = out.numel() // shape[-1], shape[2]
        _sum_copies_kernel[triton.cdiv(count, block_r),](
            rows, first, slot, out, count, length, head_rows or length,
            D=shape[-1], BLOCK_D=block_d, BLOCK_R=block_r, WIDE=wide,
        )  # fmt: skip
    return out


def _blocks(head_dim: int) -> tuple[int, int]:
    """Columns and rows of a tile."""
    columns = triton.next_power_of_2(head_dim)
    return columns, max(1, _TILE // columns)
