"""Rotary position embedding, in the rotate-half layout.

B batch, N length, D head dim.
"""

import torch
from torch import Tensor


def apply_rope(x: Tensor, theta: float, positions: Tensor | None = None, scaling: float = 1.0) -> Tensor:
    """Rotate the rows of `x` by their positions, divided by `scaling`.

    Args:
        x: `[B, heads, N, D]`, D even.
        theta: base of the frequencies.
        positions: integers `[B, N]`. Default: 0 … N-1.
        scaling: divides the positions, which fits a longer text into the angles of training.

    Source: arXiv 2104.09864; halves rotated as in GPT-NeoX and Llama; scaling as in arXiv 2306.15595.
    """
    length, dim = x.shape[-2:]
    dtype = torch.promote_types(x.dtype, torch.float32)
    frequency = theta ** -(torch.arange(0, dim, 2, device=x.device, dtype=dtype) / dim)
    if positions is None:
        positions = torch.arange(length, device=x.device)[None]
    angle = (positions.to(dtype) / scaling)[:, None, :, None, None] * frequency  # [B or 1, 1, N, 1, D / 2]
    table = torch.stack([angle.cos(), angle.sin()]).to(x.dtype)
    cos, sin = stored(table) if torch.compiler.is_compiling() else table
    # Each element finds its partner by index; if halves were split and joined, Inductor would compute everything twice.
    halves, sign = x.unflatten(-1, (2, -1)), torch.arange(-1, 2, 2, device=x.device, dtype=x.dtype)
    return (halves * cos + halves.flip(-2) * (sign[:, None] * sin)).flatten(-2)


@torch.library.custom_op("dma_lightning::stored", mutates_args=())
def stored(x: Tensor) -> Tensor:
    """`x` itself, opaque to Inductor, which would otherwise recompute cosines for every head of every sequence."""
    return x.clone()


@stored.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)
