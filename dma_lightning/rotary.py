"""Rotary position embedding, in the rotate-half layout.

B batch, N length, D head dim.
"""

import torch
from torch import Tensor


def apply_rotary(x: Tensor, theta: float, positions: Tensor | None = None, scaling: float = 1.0) -> Tensor:
    """Rotate the rows of `x` by their positions, divided by `scaling`.

    Args:
        x: `[B, heads, N, D]`, D even.
        theta: base of the frequencies.
        positions: integers `[B, N]`, by default 0 … N-1.
        scaling: positions are divided by it, which fits a longer text into the angles of training.

    Source: arXiv 2104.09864; halves rotated as in GPT-NeoX and Llama; scaling as in arXiv 2306.15595.
    """
    length, dim = x.shape[-2:]
    if positions is None:
        cos, sin = rotary_table(length, dim, float(theta), float(scaling), x.dtype, x.device)  # [N, D / 2]
    else:
        cos, sin = _rotations(positions[:, None], dim, theta, scaling, x.dtype)  # [B, 1, N, D / 2]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


@torch.library.custom_op("dma_lightning::rotary_table", mutates_args=())
def rotary_table(
    length: int, dim: int, theta: float, scaling: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the positions 0 … N-1, `[N, D / 2]` each.

    An operation of its own, since Inductor would compute them again for every head of every sequence.
    """
    return _rotations(torch.arange(length, device=device), dim, theta, scaling, dtype)


@rotary_table.register_fake
def _(
    length: int, dim: int, theta: float, scaling: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    cos, sin = (torch.empty(length, dim // 2, dtype=dtype, device=device) for _ in range(2))
    return cos, sin


def _rotations(positions: Tensor, dim: int, theta: float, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles of positions `[…]`, `[…, D / 2]` each, computed in float32 or better."""
    wide = torch.promote_types(dtype, torch.float32)
    frequency = theta ** -(torch.arange(0, dim, 2, device=positions.device, dtype=wide) / dim)
    angle = (positions.to(wide) / scaling)[..., None] * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)
