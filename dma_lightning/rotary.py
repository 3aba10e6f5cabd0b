"""Rotary position embedding, in the rotate-half layout.

N length, D head dim.
"""

import torch
from torch import Tensor


def apply_rotary(x: Tensor, theta: float) -> Tensor:
    """Rotate the rows of `x` `[..., N, D]` by their positions 0 … N-1; D is even.

    Source: arXiv 2104.09864; halves rotated as in GPT-NeoX and Llama.
    """
    length, dim = x.shape[-2:]
    dtype = torch.promote_types(x.dtype, torch.float32)
    frequency = theta ** -(torch.arange(0, dim, 2, device=x.device, dtype=dtype) / dim)
    angle = torch.arange(length, device=x.device, dtype=dtype)[:, None] * frequency  # [N, D / 2]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
