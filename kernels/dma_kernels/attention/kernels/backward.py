"""The backward pass: which kernels, in which order, and how much memory dS takes between them.

The kernel of the key gradients stores dS, that of the query gradients reads it. Segments do not share queries, so they
go through both in parts, one after the other through the same memory. No sum goes over parts: the bits do not depend
on their size.

B batch, H query heads, G KV heads, R = H / G group, N length, D head dim, S segment length, K slots, Z = B * segments.
"""

import os

import torch
from torch import Tensor

from dma_kernels.attention.kernels.delta import launch_delta
from dma_kernels.attention.kernels.key_gradients import KeyGradients, StoredScores, key_tile, launch_into
from dma_kernels.attention.kernels.query_gradients import launch_query_gradients, list_key_tiles

_VARIABLE = "DMA_KERNEL_BACKWARD_MIB"
_MIB = 512


def launch_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    birth: Tensor,
    death: Tensor,
    lse: Tensor,
    out: Tensor,
    grad_out: Tensor,
    *,
    scale: float,
    segment_length: int,
    dquery_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, `[B, H, N, D]`, k and v, `[Z, G, K, D]`, in their dtypes, and of the bias, float32 `[Z, G, K]`.

    Arguments and layout are those of `launch_forward`; `out` and `lse` are its results, and `grad_out` is the gradient
    of `out`. The sums of dS over the keys of a query go into `dquery_bias`, float32 `[B, H, N]`, if it is given.
    """
    (batch, heads, length, head_dim), (z, kv_heads, keys) = q.shape, k.shape[:3]
    delta = launch_delta(out, grad_out)
    block_k = key_tile(q, keys)
    lists = list_key_tiles(birth, death, q, segment_length, block_k)
    dq = torch.empty((batch, length, heads, head_dim), dtype=q.dtype, device=q.device).transpose(1, 2)
    gradients, rows, columns = KeyGradients.like(k, v), kv_heads * keys, heads // kv_heads * segment_length
    part = min(z, max(1, ds_bytes() // (rows * columns * q.element_size())))  # segments
    ds = q.new_empty(part * rows, columns)
    sums = None if dquery_bias is None else q.new_empty(part * rows // block_k, columns, dtype=torch.float32)
    for first_z in range(0, z, part):
        stored = StoredScores(ds[: (z - first_z) * rows], sums, first_z, lists.config.rows)
        launch_into(
            gradients, q, k, v, bias, birth, death, lse, delta, grad_out,
            scale=scale, segment_length=segment_length, stored=stored,
        )  # fmt: skip
        launch_query_gradients(
            stored, k, lists, dq, scale=scale, segment_length=segment_length, dquery_bias=dquery_bias
        )
    return dq, *gradients


def ds_bytes() -> int:
    """The most memory that dS may take, as the environment says; at least that of one segment is taken.

    Raises:
        ValueError: if it says no number above 0.
    """
    said = os.environ.get(_VARIABLE, str(_MIB))
    if not said.isdecimal() or not int(said):
        raise ValueError(f"{_VARIABLE}: expected a whole number of MiB above 0, got {said!r}; change or unset it")
    return int(said) << 20
