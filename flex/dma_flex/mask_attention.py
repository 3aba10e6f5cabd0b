"""Attention over lifetimes with keys in their natural order, as one compiled FlexAttention call.

B batch, H query heads, G KV heads, N length, D head dim.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from dma_flex.block_masks import block_mask
from dma_flex.segment_attention import check_differentiable, told_recompile_limit
from dma_kernels import Lifetimes
from dma_kernels.checks import check_attention_inputs, check_lifetimes


def flex_mask_attention(q: Tensor, k: Tensor, v: Tensor, lifetimes: Lifetimes, scale: float | None = None) -> Tensor:
    """Softmax attention over the live keys, for masks whose blocks of 128 are mostly empty or full, such as documents.

    If the live keys of a query are scattered, as in a dynamic mask, `flex_segment_attention` skips far more. This
    function trains on CUDA, and infers on CUDA and CPU. On the CPU, FlexAttention gives 0 for a NaN in q or k. The
    first call with new shapes compiles.

    Args:
        q: `[B, H, N, D]`, float32, bfloat16 or float16.
        k: `[B, G, N, D]`, H a multiple of G.
        v: `[B, G, N, Dv]`.
        lifetimes: the mask, for B or 1 sequences and G or 1 KV heads.
        scale: factor of q·k, by default `1 / sqrt(D)`.

    Returns:
        `[B, H, N, Dv]`. A query without any key gives 0.

    Raises:
        ValueError: if shapes, dtypes or devices do not match, or a gradient is needed on a CPU.
        RuntimeError: at torch.compile's recompile limit.
    """
    check_attention_inputs(q, k, k)
    check_lifetimes(lifetimes, k)
    if v.ndim != 4 or v.shape[:3] != k.shape[:3] or v.dtype != k.dtype or v.device != k.device:
        raise ValueError(
            f"v: expected {list(k.shape[:3])} and a head dim, {k.dtype} on {k.device}, as k, got {list(v.shape)}, "
            f"{v.dtype} on {v.device}"
        )
    check_differentiable(q, k, v)
    mask = block_mask(lifetimes, q.shape[2], num_heads=None if lifetimes.death.shape[1] == 1 else q.shape[1])
    grouped = q.shape[1] != k.shape[1]
    if torch.compiler.is_compiling():
        return flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped)
    with told_recompile_limit(q):
        return _compiled_attention()(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped)


@cache
def _compiled_attention() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, fullgraph=True, dynamic=False)
