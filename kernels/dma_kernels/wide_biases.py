"""Biases in float64, for attention that computes in float32.

A drift adds up along a text. Near 1,000,000, float32 has steps of 0.06, so the biases of neighboring keys would differ
by far more, or less, than they should. But softmax ignores what all keys of a query have in common. So a query bias is
added first, in float64, and the small sum is rounded. For a drift, the query bias is minus the drift of the query.

B batch, G KV heads, N length.
"""

import torch
from torch import Tensor

from dma_kernels.ranks import saturated


def shift_of(query_bias: Tensor) -> Tensor:
    """The number to add to key biases before they are rounded: a query bias in float64, 0 where it is not finite.

    It has no gradient, since the output does not depend on it.
    """
    wide = query_bias.detach().double()
    return wide.where(wide.isfinite(), 0)


def in_float32(bias: Tensor) -> Tensor:
    """Float64 biases in float32, `saturated`: large ones become the largest bias, and only infinities stay infinite."""
    largest = torch.finfo(torch.float32).max
    return saturated(bias.where(bias.isinf(), bias.clamp(-largest, largest)).float())


def are_wide(key_bias: Tensor, dtype: torch.dtype) -> bool:
    """Whether biases have to be rounded for attention that is computed in `dtype`."""
    return key_bias.dtype == torch.float64 and dtype != torch.float64
