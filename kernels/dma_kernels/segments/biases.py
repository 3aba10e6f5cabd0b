"""Gathers key biases into slots, in float32; float64 biases become relative to the first query of their segment.

A key that a segment's queries see has either drifted little from the segment's first query, or so far that its weight
in the softmax vanishes. So one number, the first query's bias, makes all relevant key biases of a segment small; see
`wide_biases`.

B batch, G KV heads, N length, T segments, S segment length, K slots, Z = B * T.
"""

import torch
from torch import Tensor

from dma_kernels.launching import register_launch
from dma_kernels.ranks import saturated
from dma_kernels.segments.gather import gather_rows_plain
from dma_kernels.wide_biases import in_float32, shift_of


def segment_shifts(query_bias: Tensor, segment_length: int) -> Tensor:
    """The shift to add to the float64 key biases of each segment, float64 `[Z, G]`, from a query bias `[B, G, N]`."""
    return shift_of(query_bias[..., ::segment_length]).transpose(1, 2).flatten(0, 1)


def gather_biases_reference(key_bias: Tensor, query_bias: Tensor | None, row: Tensor, segment_length: int) -> Tensor:
    """`gather_biases` in plain PyTorch, with the same arguments; differentiable twice in `key_bias`."""
    if key_bias.dtype != torch.float64:
        return gather_rows_plain(saturated(key_bias)[..., None], row).squeeze(-1)
    bias = gather_rows_plain(key_bias[..., None], row).squeeze(-1)
    if query_bias is not None:
        bias = bias + segment_shifts(query_bias, segment_length)[..., None]
    return in_float32(bias).masked_fill(row < 0, 0)


@torch.library.custom_op("dma_kernels::gather_biases", mutates_args=())
def gather_biases(key_bias: Tensor, query_bias: Tensor | None, row: Tensor, segment_length: int) -> Tensor:
    """Saturated biases in their slots, float32 `[Z, G, K]`; zeros in empty slots. It has no gradient.

    Args:
        key_bias: float32 or float64 `[B, G, N]`, N filled up to whole segments.
        query_bias: float32 or float64 `[B, G, n]`, where n covers at least the first query of each segment. The bias of
            a segment's first query is added to float64 key biases before they are rounded.
        row: row of the key in each slot, as in `Copies`, `[Z, G, K]`.
        segment_length: S.
    """
    return gather_biases_reference(key_bias, query_bias, row, segment_length)


@register_launch(gather_biases)
def _(key_bias: Tensor, query_bias: Tensor | None, row: Tensor, segment_length: int) -> Tensor:
    from dma_kernels.segments.gather_kernels import launch_gather_biases

    return launch_gather_biases(key_bias, query_bias, row, segment_length=segment_length)


@gather_biases.register_fake
def _(key_bias: Tensor, query_bias: Tensor | None, row: Tensor, segment_length: int) -> Tensor:
    return key_bias.new_empty(row.shape, dtype=torch.float32)
