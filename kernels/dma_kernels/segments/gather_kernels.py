"""Triton kernels that copy rows and biases into slots (`gather.py`, `biases.py`); bound by memory bandwidth.

B batch, G KV heads, N length, S segment length, K slots, Z = B * segments, M slots of any shape, R rows, D head dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dma_kernels.primitives import LOG2_E
from dma_kernels.rank_kernels import saturated

_INFINITY = tl.constexpr(float("inf"))
_TILE = 1024  # elements per program; with more rows, more of them would wait for the row with the most copies


@triton.jit
def _locate_rows(p_row, slots, heads, length, BLOCK_M: tl.constexpr):
    """A program's slots, which of them hold a row, and the sequence, head and position of that row."""
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_row = tl.load(p_row + o_m, mask=o_m < slots, other=-1)
    b_head, b_position = (b_row // length).to(tl.int64), (b_row % length).to(tl.int64)
    return o_m, b_row >= 0, b_head // heads, b_head % heads, b_position


@triton.jit
def _copy_rows(p_x, p_out, o_m, m_row, o_x, slots, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Copy the rows at `o_x` into slots; zeros into empty slots."""
    o_d = tl.arange(0, BLOCK_D)
    m_x = m_row[:, None] & (o_d < D)[None, :]
    b_x = tl.load(p_x + o_x[:, None] + o_d[None, :], mask=m_x, other=0.0)  # [BLOCK_M, BLOCK_D]
    tl.store(p_out + o_m[:, None] * D + o_d[None, :], b_x, mask=(o_m < slots)[:, None] & (o_d < D)[None, :])


@triton.jit
def _copy_biases(
    p_bias, p_query_bias, p_out, p_base_2, o_m, m_row, i_b, i_g, o_n, slots, heads, segments, segment, keys,
    bias_b, bias_g, bias_n, query_b, query_g, query_n,
):  # fmt: skip
    """Copy saturated biases into slots; if there is a query bias, that of the segment's first query is added."""
    b_bias = tl.load(p_bias + i_b * bias_b + i_g * bias_g + o_n * bias_n, mask=m_row, other=0.0)
    if p_query_bias is not None:
        o_first = o_m // (heads * keys) % segments * segment
        b_shift = tl.load(p_query_bias + i_b * query_b + i_g * query_g + o_first * query_n, mask=m_row, other=0.0)
        b_bias += tl.where(tl.abs(b_shift) < _INFINITY, b_shift, 0.0).to(tl.float64)  # not infinities or NaN
    b_bias = saturated(b_bias).to(tl.float32)
    tl.store(p_out + o_m, b_bias, mask=o_m < slots)
    if p_base_2 is not None:
        tl.store(p_base_2 + o_m, b_bias * LOG2_E, mask=o_m < slots)  # a saturated bias stays finite


@triton.jit
def _gather_rows_kernel(
    p_x, p_row, p_out, slots, heads, length, x_b, x_g, x_n,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Gather the rows of one tensor."""
    o_m, m_row, i_b, i_g, o_n = _locate_rows(p_row, slots, heads, length, BLOCK_M)
    _copy_rows(p_x, p_out, o_m, m_row, i_b * x_b + i_g * x_g + o_n * x_n, slots, D, BLOCK_D)


@triton.jit
def _gather_biases_kernel(
    p_bias, p_query_bias, p_row, p_out, slots, heads, length, segments, segment, keys,
    bias_b, bias_g, bias_n, query_b, query_g, query_n, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Gather biases."""
    o_m, m_row, i_b, i_g, o_n = _locate_rows(p_row, slots, heads, length, BLOCK_M)
    _copy_biases(
        p_bias, p_query_bias, p_out, None, o_m, m_row, i_b, i_g, o_n, slots, heads, segments, segment, keys,
        bias_b, bias_g, bias_n, query_b, query_g, query_n,
    )  # fmt: skip


@triton.jit
def _gather_keys_kernel(
    p_k, p_v, p_bias, p_query_bias, p_row, p_k_out, p_v_out, p_bias_out, p_base_2,
    slots, heads, length, segments, segment, keys,
    k_b, k_g, k_n, v_b, v_g, v_n, bias_b, bias_g, bias_n, query_b, query_g, query_n,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Gather the rows of keys and values, and biases; store the biases also in base 2."""
    o_m, m_row, i_b, i_g, o_n = _locate_rows(p_row, slots, heads, length, BLOCK_M)
    _copy_rows(p_k, p_k_out, o_m, m_row, i_b * k_b + i_g * k_g + o_n * k_n, slots, D, BLOCK_D)
    _copy_rows(p_v, p_v_out, o_m, m_row, i_b * v_b + i_g * v_g + o_n * v_n, slots, D, BLOCK_D)
    _copy_biases(
        p_bias, p_query_bias, p_bias_out, p_base_2, o_m, m_row, i_b, i_g, o_n, slots, heads, segments, segment, keys,
        bias_b, bias_g, bias_n, query_b, query_g, query_n,
    )  # fmt: skip


def launch_gather_rows(x: Tensor, row: Tensor) -> Tensor:
    """`gather_rows` of `x` [B, G, N, D] by int32 `row` [M...]."""
    x, row = _with_lines(x), row.contiguous()
    out = x.new_empty(*row.shape, x.shape[-1])
    block_d, block_m = tile_of_rows(x.shape[-1])
    if out.numel():
        _gather_rows_kernel[triton.cdiv(row.numel(), block_m),](
            x, row, out, row.numel(), x.shape[1], x.shape[2], *x.stride()[:3],
            D=x.shape[-1], BLOCK_D=block_d, BLOCK_M=block_m,
        )  # fmt: skip
    return out


def launch_gather_biases(key_bias: Tensor, query_bias: Tensor | None, row: Tensor, *, segment_length: int) -> Tensor:
    """`gather_biases` of `[B, G, N]` by int32 `row` [Z, G, K]; N need not be filled up to whole segments."""
    row = row.contiguous()
    out = key_bias.new_empty(row.shape, dtype=torch.float32)
    shifted = _shift(key_bias, query_bias)
    if out.numel():
        _gather_biases_kernel[triton.cdiv(row.numel(), _TILE),](
            key_bias, shifted, row, out, *_sizes(key_bias, row, segment_length),
            *key_bias.stride(), *_strides(shifted), BLOCK_M=_TILE,
        )  # fmt: skip
    return out


def launch_gather_keys(
    k: Tensor, v: Tensor, key_bias: Tensor, query_bias: Tensor | None, row: Tensor, *, segment_length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gather `k` and `v`, both `[B, G, N, D]`, as `gather_rows`, and biases, as `gather_biases`, in one launch.

    The last tensor that it returns holds the biases in base 2, that is, times log2(e).
    """
    k, v, row, head_dim = _with_lines(k), _with_lines(v), row.contiguous(), k.shape[-1]
    k_out, v_out = (x.new_empty(*row.shape, head_dim) for x in (k, v))
    bias_out, base_2 = (key_bias.new_empty(row.shape, dtype=torch.float32) for _ in range(2))
    shifted, (block_d, block_m) = _shift(key_bias, query_bias), tile_of_rows(head_dim)
    if row.numel():
        _gather_keys_kernel[triton.cdiv(row.numel(), block_m),](
            k, v, key_bias, shifted, row, k_out, v_out, bias_out, base_2, *_sizes(key_bias, row, segment_length),
            *k.stride()[:3], *v.stride()[:3], *key_bias.stride(), *_strides(shifted),
            D=head_dim, BLOCK_D=block_d, BLOCK_M=block_m,
        )  # fmt: skip
    return k_out, v_out, bias_out, base_2


def _with_lines(x: Tensor) -> Tensor:
    """`x`, or a contiguous copy if the stride of the last dim is not 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _shift(key_bias: Tensor, query_bias: Tensor | None) -> Tensor | None:
    """The query bias, if it shifts the key biases: only float64 key biases are shifted."""
    return query_bias if key_bias.dtype == torch.float64 else None


def _strides(query_bias: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if query_bias is None else query_bias.stride()


def _sizes(key_bias: Tensor, row: Tensor, segment_length: int) -> tuple[int, ...]:
    """Numbers of slots, KV heads, rows per head, segments per sequence, positions and slots per segment."""
    segments = row.shape[0] // key_bias.shape[0]
    return row.numel(), key_bias.shape[1], segments * segment_length, segments, segment_length, row.shape[-1]


def tile_of_rows(head_dim: int) -> tuple[int, int]:
    """Columns and rows of the tile that a program copies or sums."""
    columns = triton.next_power_of_2(head_dim)
    return columns, max(1, _TILE // columns)
