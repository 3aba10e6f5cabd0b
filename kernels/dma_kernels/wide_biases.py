"""Biases in float64, of which attention in float32 adds what a query sees to its logits.

A drift adds up along a text, and float32 has steps of 0.06 near 1,000,000: neighboring keys would get biases that
differ by far more, or less, than they should. But softmax does not see what all keys of a query have in common. So a
query bias, which for a drift is minus that of the query, is added first, in float64, and the small sum is rounded.

B batch, G KV heads, N length.
"""

import torch
from torch import Tensor

from dma_kernels.ranks import saturated


def shift_of(query_bias: Tensor) -> Tensor:
    """What to add to key biases before they are rounded: a query bias in float64, 0 where it is not finite.

    A constant: the output does not depend on it.
    """
    wide = query_bias.detach().double()
    return wide.where(wide.isfinite(), 0)


def in_float32(bias: Tensor) -> Tensor:
    """Float64 biases in float32, `saturated`: large ones get the largest bias, and only infinities are infinite."""
    largest = torch.finfo(torch.float32).max
    return saturated(bias.where(bias.isinf(), bias.clamp(-largest, largest)).float())


def are_wide(key_bias: Tensor, dtype: torch.dtype) -> bool:
    """Whether biases have to be rounded for attention that is computed in `dtype`."""
    return key_bias.dtype == torch.float64 and dtype != torch.float64
