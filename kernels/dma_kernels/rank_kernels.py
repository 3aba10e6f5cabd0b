"""How Triton kernels compare ranks, and bound the biases that they add."""

import torch
import triton
import triton.language as tl

from dma_kernels.ranks import CANONICAL_NAN, DROPPED_MANTISSA_BITS, SATURATION

_DROPPED, _NAN = tl.constexpr(DROPPED_MANTISSA_BITS), tl.constexpr(CANONICAL_NAN)
LARGEST_BIAS = tl.constexpr(torch.finfo(torch.float32).max / SATURATION)
_INFINITY = tl.constexpr(float("inf"))
_HALF, _KEPT = tl.constexpr((1 << (DROPPED_MANTISSA_BITS - 1)) - 1), tl.constexpr(-(1 << DROPPED_MANTISSA_BITS))


@triton.jit
def ordered_bits(b_rank):
    """`ranks.ordered_bits`, for float32."""
    b_bits = b_rank.to(tl.int32, bitcast=True)
    b_bits = tl.where((b_bits & 0x7FFFFFFF) > 0x7F800000, _NAN, b_bits)
    b_odd = (b_bits >> _DROPPED) & 1  # round half to even
    b_bits = (b_bits + _HALF + b_odd) & _KEPT
    b_ordered = b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)
    return tl.where((b_bits & 0x7FFFFFFF) == 0, 0, b_ordered)


@triton.jit
def saturated(bias):
    """`ranks.saturated`, for float32."""
    below = tl.where(bias > LARGEST_BIAS, LARGEST_BIAS, bias)  # keeps NaN
    bounded = tl.where(below < -LARGEST_BIAS, -LARGEST_BIAS, below)
    return tl.where(tl.abs(bias) == _INFINITY, bias, bounded)
