"""What Triton kernels compare ranks by, and the scores that they add."""

import torch
import triton
import triton.language as tl

from dma_kernels.scores import CANONICAL_NAN, DROPPED_MANTISSA_BITS, SATURATION

_DROPPED, _NAN = tl.constexpr(DROPPED_MANTISSA_BITS), tl.constexpr(CANONICAL_NAN)
LARGEST_SCORE = tl.constexpr(torch.finfo(torch.float32).max / SATURATION)
_INFINITY = tl.constexpr(float("inf"))
_HALF, _KEPT = tl.constexpr((1 << (DROPPED_MANTISSA_BITS - 1)) - 1), tl.constexpr(-(1 << DROPPED_MANTISSA_BITS))


@triton.jit
def ordered_bits(b_rank):
    """`scores.ordered_bits` of float32."""
    b_bits = b_rank.to(tl.int32, bitcast=True)
    b_bits = tl.where((b_bits & 0x7FFFFFFF) > 0x7F800000, _NAN, b_bits)
    b_odd = (b_bits >> _DROPPED) & 1  # round half to even
    b_bits = (b_bits + _HALF + b_odd) & _KEPT
    b_ordered = b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)
    return tl.where((b_bits & 0x7FFFFFFF) == 0, 0, b_ordered)


@triton.jit
def saturated(score):
    """`scores.saturated` of float32."""
    below = tl.where(score > LARGEST_SCORE, LARGEST_SCORE, score)  # keeps NaN
    bounded = tl.where(below < -LARGEST_SCORE, -LARGEST_SCORE, below)
    return tl.where(tl.abs(score) == _INFINITY, score, bounded)
