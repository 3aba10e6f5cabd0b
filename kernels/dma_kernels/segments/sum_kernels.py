"""Triton kernels that sum the gradients of copied rows (`gather.py`); bound by memory bandwidth.

They walk along each row's list of copies, in one pass. They need no atomics and no sort, and give the same bits in
every run.

B batch, G KV heads, N length, K slots, Z = B * segments, M slots of any shape, R rows, D head dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dma_kernels.segments.gather_kernels import tile_of_rows


@triton.jit
def _locate_copies(p_first, count, length, head_rows, BLOCK_R: tl.constexpr):
    """A program's rows, which of them are real, and where their lists of copies begin and how long they are.

    The lists have `head_rows` rows per head. Only the first `length` of them are summed, `count` rows in all heads.
    """
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r, o_row = o_r < count, o_r // length * head_rows + o_r % length
    b_first = tl.load(p_first + o_row, mask=m_r, other=0)
    return o_r, m_r, b_first, tl.load(p_first + o_row + 1, mask=m_r, other=0) - b_first


@triton.jit
def _load_copies(p_rows, b_slot, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load the contents of slots, [BLOCK_R, BLOCK_D]; zeros for slot -1."""
    o_d = tl.arange(0, BLOCK_D)
    m_x = (b_slot >= 0)[:, None] & (o_d < D)[None, :]
    return tl.load(p_rows + b_slot.to(tl.int64)[:, None] * D + o_d[None, :], mask=m_x, other=0.0)


@triton.jit
def _store_sums(p_out, b_sum, o_r, m_r, D: tl.constexpr, BLOCK_D: tl.constexpr):
    o_d = tl.arange(0, BLOCK_D)
    tl.store(p_out + o_r[:, None] * D + o_d[None, :], b_sum, mask=m_r[:, None] & (o_d < D)[None, :])


@triton.jit
def _sum_copies_kernel(
    p_rows, p_first, p_slot, p_out, count, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """Sum the copies of each row, in order."""
    o_r, m_r, b_first, b_copies = _locate_copies(p_first, count, count, count, BLOCK_R)
    b_sum = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    for i in range(tl.max(b_copies)):
        b_slot = tl.load(p_slot + b_first + i, mask=i < b_copies, other=-1)
        b_sum += _load_copies(p_rows, b_slot, D, BLOCK_D).to(tl.float32)
    _store_sums(p_out, b_sum, o_r, m_r, D, BLOCK_D)


@triton.jit
def _sum_key_gradients_kernel(
    p_dk, p_dv, p_dbias, p_first, p_slot, p_dk_out, p_dv_out, p_dbias_out, count, length, head_rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Sum the copies of keys, values and biases together, so that the lists of copies are read only once."""
    o_r, m_r, b_first, b_copies = _locate_copies(p_first, count, length, head_rows, BLOCK_R)
    b_dk = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    b_dv = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    b_dbias = tl.zeros([BLOCK_R], dtype=p_dbias_out.dtype.element_ty)
    for i in range(tl.max(b_copies)):
        b_slot = tl.load(p_slot + b_first + i, mask=i < b_copies, other=-1)
        b_dk += _load_copies(p_dk, b_slot, D, BLOCK_D).to(tl.float32)
        b_dv += _load_copies(p_dv, b_slot, D, BLOCK_D).to(tl.float32)
        b_dbias += tl.load(p_dbias + b_slot, mask=b_slot >= 0, other=0.0).to(b_dbias.dtype)
    _store_sums(p_dk_out, b_dk, o_r, m_r, D, BLOCK_D)
    _store_sums(p_dv_out, b_dv, o_r, m_r, D, BLOCK_D)
    tl.store(p_dbias_out + o_r, b_dbias, mask=m_r)


def launch_sum_copies(rows: Tensor, first: Tensor, slot: Tensor, *, shape: list[int]) -> Tensor:
    """`sum_copies` of `rows` [M..., D] into `shape` [B, G, N, D]; the sums are computed in float32."""
    rows, out = rows.contiguous(), rows.new_empty(shape)
    block_d, block_r = tile_of_rows(shape[-1])
    if out.numel():
        count = out.numel() // shape[-1]
        _sum_copies_kernel[triton.cdiv(count, block_r),](
            rows, first, slot, out, count, D=shape[-1], BLOCK_D=block_d, BLOCK_R=block_r
        )
    return out


def launch_sum_key_gradients(
    dk: Tensor, dv: Tensor, dbias: Tensor, first: Tensor, slot: Tensor, *, shape: tuple[int, int, int], wide: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the copies of dk and dv, `[Z, G, K, D]`, and dbias, `[Z, G, K]`, all contiguous, in one launch.

    Returns:
        dk and dv, `[*shape, D]` in their dtypes, and dbias, `shape`. `shape` is [B, G, N]. If `wide`, dbias is summed
        and returned in float64, and otherwise in float32.
    """
    batch, kv_heads, length = shape
    dk_out, dv_out = (x.new_empty(*shape, x.shape[-1]) for x in (dk, dv))
    dbias_out = dbias.new_empty(shape, dtype=torch.float64 if wide else torch.float32)
    block_d, block_r = tile_of_rows(dk.shape[-1])
    count, head_rows = dbias_out.numel(), (first.numel() - 1) // (batch * kv_heads)
    _sum_key_gradients_kernel[triton.cdiv(count, block_r),](
        dk, dv, dbias, first, slot, dk_out, dv_out, dbias_out, count, length, head_rows,
        D=dk.shape[-1], BLOCK_D=block_d, BLOCK_R=block_r,
    )  # fmt: skip
    return dk_out, dv_out, dbias_out
