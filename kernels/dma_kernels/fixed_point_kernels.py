"""Triton kernels behind `fixed_point.py`: the prefix sum of steps in whole units, which ends at the largest drift.

min(a + b, largest) of numbers from 0 on is associative, so blocks can be added up apart from each other: the first
kernel adds up each block, and the second adds what is before a block to the sums within it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dma_kernels.units import FRACTION_BITS, LARGEST

_BLOCK = 1024
_LARGEST, _UNITS = tl.constexpr(LARGEST), tl.constexpr(2.0**FRACTION_BITS)  # units in a nat
_WHOLE = tl.constexpr(2.0**52)  # float64 numbers from here on are whole


@triton.jit
def _add(a, b):
    return tl.minimum(a + b, _LARGEST)


@triton.jit
def _load_units(p_steps, o_n, length):
    """Steps in units, rounded half to even; negative ones and NaN are 0."""
    b_nats = tl.load(p_steps + o_n, mask=o_n < length, other=0.0).to(tl.float64)
    b_units = tl.where(b_nats > 0, tl.minimum(b_nats, _LARGEST / _UNITS) * _UNITS, 0.0)
    return tl.where(b_units < _WHOLE, (b_units + _WHOLE) - _WHOLE, b_units).to(tl.int64)


@triton.jit
def _sum_blocks_kernel(p_steps, p_sum, length, blocks, BLOCK: tl.constexpr):
    """The sum of one block of one row."""
    i_row, i_block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    b_units = _load_units(p_steps + i_row * length, i_block * BLOCK + tl.arange(0, BLOCK), length)
    tl.store(p_sum + tl.program_id(0), tl.reduce(b_units, 0, _add))


@triton.jit
def _drift_sums_kernel(p_steps, p_sum, p_start, p_drift, length, blocks, BLOCK: tl.constexpr):
    """All sums of one block of one row."""
    i_row, i_block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    before = tl.zeros([], dtype=tl.int64)
    if p_start is not None:
        before = tl.load(p_start + i_row)
    for i in range(tl.cdiv(i_block, BLOCK)):
        o_block = i * BLOCK + tl.arange(0, BLOCK)
        b_sum = tl.load(p_sum + i_row * blocks + o_block, mask=o_block < i_block, other=0)
        before = _add(before, tl.reduce(b_sum, 0, _add))
    o_n = i_block * BLOCK + tl.arange(0, BLOCK)
    b_drift = tl.associative_scan(_load_units(p_steps + i_row * length, o_n, length), 0, _add)
    tl.store(p_drift + i_row * length + o_n, _add(b_drift, before), mask=o_n < length)


def launch_drift_sums(steps: Tensor, start: Tensor | None = None, block: int = _BLOCK) -> Tensor:
    """`drift_sums`, for steps `[..., N]`; a program adds up `block` of them."""
    steps, length = steps.contiguous(), steps.shape[-1]
    start = None if start is None else start.contiguous()
    drift = torch.empty(steps.shape, dtype=torch.int64, device=steps.device)
    if not drift.numel():
        return drift
    blocks = triton.cdiv(length, block)
    sums = torch.empty(steps.numel() // length * blocks, dtype=torch.int64, device=steps.device)
    _sum_blocks_kernel[(len(sums),)](steps, sums, length, blocks, BLOCK=block)
    _drift_sums_kernel[(len(sums),)](steps, sums, start, drift, length, blocks, BLOCK=block)
    return drift
