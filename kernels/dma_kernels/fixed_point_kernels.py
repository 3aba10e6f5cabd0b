"""Triton kernels behind `fixed_point.py`: prefix sums of steps in whole units, ranks, and suffix sums for gradients.

PyTorch computes each row with one block of threads, which is slow if there are few rows. Here, a first kernel computes
the total of each block of a row. A second kernel adds the totals of all blocks before (or after) to the sums within
each block. Sums of steps are limited to the largest drift. On numbers that are not negative, min(a + b, largest) is
associative, so the blocks can still be summed independently.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dma_kernels.units import FRACTION_BITS, LARGEST, NAN_RANK

_BLOCK = 1024
_LARGEST, _UNITS = tl.constexpr(LARGEST), tl.constexpr(2.0**FRACTION_BITS)  # units in a nat
_NAN_RANK = tl.constexpr(NAN_RANK)
_WHOLE = tl.constexpr(2.0**52)  # from here on, all float64 numbers are whole


@triton.jit
def _add(a, b):
    return tl.minimum(a + b, _LARGEST)


@triton.jit
def _in_units(b_nats):
    """Nats that are at least 0 in whole units, rounded half to even; 0 for NaN."""
    b_units = tl.where(b_nats > 0, tl.minimum(b_nats, _LARGEST / _UNITS) * _UNITS, 0.0)
    b_units = tl.where(b_units < _WHOLE, (b_units + _WHOLE) - _WHOLE, b_units)
    return b_units.to(tl.int64)


@triton.jit
def _load_units(p_steps, o_n, length):
    """Steps in units, with 0 for negative steps and NaN; and 1 for each step that is NaN."""
    b_nats = tl.load(p_steps + o_n, mask=o_n < length, other=0.0).to(tl.float64)
    return _in_units(b_nats), (b_nats != b_nats).to(tl.int32)


@triton.jit
def _rank(b_content, b_drift):
    """Ranks from contents in nats and drifts in units."""
    b_units = tl.where(b_content < 0, -_in_units(-b_content), _in_units(b_content))
    return tl.where(b_content != b_content, _NAN_RANK, b_units + b_drift)


@triton.jit
def _sum_blocks_kernel(p_steps, p_sum, p_broken, length, blocks, BLOCK: tl.constexpr):
    """The total of one block of one row, and how many of its steps are NaN."""
    i_row, i_block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    b_units, b_nan = _load_units(p_steps + i_row * length, i_block * BLOCK + tl.arange(0, BLOCK), length)
    tl.store(p_sum + tl.program_id(0), tl.reduce(b_units, 0, _add))
    tl.store(p_broken + tl.program_id(0), tl.sum(b_nan, axis=0))


@triton.jit
def _drifts_kernel(
    p_steps, p_sum, p_broken, p_start, p_content, p_units, p_nats, p_rank, length, blocks, BLOCK: tl.constexpr
):
    """The prefix sums of one block of one row, in units and in nats, or the ranks of contents with them."""
    i_row, i_block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    before, broken = tl.zeros([], dtype=tl.int64), tl.zeros([], dtype=tl.int32)
    if p_start is not None:
        before = tl.load(p_start + i_row)
    for i in range(tl.cdiv(i_block, BLOCK)):
        o_block = i * BLOCK + tl.arange(0, BLOCK)
        b_sum = tl.load(p_sum + i_row * blocks + o_block, mask=o_block < i_block, other=0)
        before = _add(before, tl.reduce(b_sum, 0, _add))
        broken += tl.sum(tl.load(p_broken + i_row * blocks + o_block, mask=o_block < i_block, other=0), axis=0)
    o_n = i_block * BLOCK + tl.arange(0, BLOCK)
    b_units, b_nan = _load_units(p_steps + i_row * length, o_n, length)
    b_units = _add(tl.associative_scan(b_units, 0, _add), before)
    o_n, m_n = i_row * length + o_n, o_n < length
    if p_content is not None:
        b_content = tl.load(p_content + o_n, mask=m_n, other=0.0).to(tl.float64)
        tl.store(p_rank + o_n, _rank(b_content, b_units), mask=m_n)
    else:
        b_nats = tl.where(tl.cumsum(b_nan, axis=0) + broken > 0, float("nan"), b_units.to(tl.float64) / _UNITS)
        tl.store(p_units + o_n, b_units, mask=m_n)
        tl.store(p_nats + o_n, b_nats, mask=m_n)


@triton.jit
def _sum_floats_kernel(p_x, p_sum, length, blocks, BLOCK: tl.constexpr):
    """The total of one block of one row."""
    i_row, i_block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    o_n = i_block * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(p_x + i_row * length + o_n, mask=o_n < length, other=0.0).to(tl.float64)
    tl.store(p_sum + tl.program_id(0), tl.sum(b_x, axis=0))


@triton.jit
def _suffix_sums_kernel(p_x, p_sum, p_out, length, blocks, BLOCK: tl.constexpr):
    """The suffix sums of one block of one row."""
    i_row, i_block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    after = tl.zeros([], dtype=tl.float64)
    for i in range((i_block + 1) // BLOCK, tl.cdiv(blocks, BLOCK)):
        o_block = i * BLOCK + tl.arange(0, BLOCK)
        m_after = (o_block > i_block) & (o_block < blocks)
        after += tl.sum(tl.load(p_sum + i_row * blocks + o_block, mask=m_after, other=0.0), axis=0)
    o_n = i_block * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(p_x + i_row * length + o_n, mask=o_n < length, other=0.0).to(tl.float64)
    tl.store(p_out + i_row * length + o_n, tl.cumsum(b_x, axis=0, reverse=True) + after, mask=o_n < length)


def launch_drifts(steps: Tensor, start: Tensor | None = None, block: int = _BLOCK) -> tuple[Tensor, Tensor]:
    """`drifts`, for steps `[..., N]`; each program sums `block` of them."""
    units, nats = (torch.empty(steps.shape, dtype=x, device=steps.device) for x in (torch.int64, torch.float64))
    _launch_sums(steps, start, None, units, nats, None, block)
    return units, nats


def launch_ranks(content: Tensor, steps: Tensor, block: int = _BLOCK) -> Tensor:
    """`fixed_point_ranks`, for contents and steps `[..., N]`."""
    ranks = torch.empty(steps.shape, dtype=torch.int64, device=steps.device)
    _launch_sums(steps, None, content.contiguous(), None, None, ranks, block)
    return ranks


def _launch_sums(
    steps: Tensor, start: Tensor | None, content: Tensor | None, units: Tensor | None, nats: Tensor | None,
    ranks: Tensor | None, block: int,
) -> None:  # fmt: skip
    """Write drifts, or ranks if there are contents."""
    if not steps.numel():
        return
    steps, start = steps.contiguous(), None if start is None else start.contiguous()
    length, blocks, programs = _sizes(steps, block)
    sums, broken = (torch.empty(programs, dtype=x, device=steps.device) for x in (torch.int64, torch.int32))
    _sum_blocks_kernel[(programs,)](steps, sums, broken, length, blocks, BLOCK=block)
    _drifts_kernel[(programs,)](
        steps, sums, broken, start, content, units, nats, ranks, length, blocks, BLOCK=block
    )  # fmt: skip


def launch_suffix_sums(x: Tensor, block: int = _BLOCK) -> Tensor:
    """`suffix_sums` of `x` [..., N]; each program sums `block` numbers."""
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=torch.float64, device=x.device)
    if x.numel():
        length, blocks, programs = _sizes(x, block)
        sums = torch.empty(programs, dtype=torch.float64, device=x.device)
        _sum_floats_kernel[(programs,)](x, sums, length, blocks, BLOCK=block)
        _suffix_sums_kernel[(programs,)](x, sums, out, length, blocks, BLOCK=block)
    return out


def _sizes(x: Tensor, block: int) -> tuple[int, int, int]:
    """Length of rows, blocks of a row, and blocks of all rows."""
    length = x.shape[-1]
    blocks = triton.cdiv(length, block)
    return length, blocks, x.numel() // length * blocks
