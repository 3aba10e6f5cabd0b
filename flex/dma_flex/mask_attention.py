"""Attention over lifetimes with keys in their natural order, as one compiled FlexAttention call.

B batch, H query heads, G KV heads, N length, D head dim.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from dma_flex.block_masks import block_mask
from dma_kernels import Lifetimes


def flex_mask_attention(q: Tensor, k: Tensor, v: Tensor, lifetimes: Lifetimes, scale: float | None = None) -> Tensor:
    """Softmax attention over the live keys, for masks whose blocks of 128 are mostly empty or full, such as documents.

    Where the live keys of a query are scattered, as in a dynamic mask, `flex_segment_attention` skips far more. Trains
    on CUDA, infers on CUDA and CPU. The first call with new shapes compiles.

    Args:
        q: `[B, H, N, D]`, float32, bfloat16 or float16.
        k: `[B, G, N, D]`, H a multiple of G.
        v: `[B, G, N, Dv]`.
        lifetimes: the mask, for B or 1 sequences and G or 1 KV heads.
        scale: factor of q·k, by default `1 / sqrt(D)`.

    Returns:
        `[B, H, N, Dv]`. A query without any key gives 0.

    Raises:
        ValueError: if the mask does not fit.
    """
    heads = None if lifetimes.death.shape[1] == 1 else q.shape[1]
    mask = block_mask(lifetimes, q.shape[2], num_heads=heads)
    attend = flex_attention if torch.compiler.is_compiling() else _compiled_attention()
    return attend(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


@cache
def _compiled_attention() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, fullgraph=True, dynamic=False)
