"""The backward pass: the order of its kernels, and the memory for dS.

The kernel of the key gradients stores dS, and the kernel of the query gradients reads it. A line is one segment of one
KV head. No sum here crosses lines, so lines can go through both kernels in parts, and the size of a part does not
change the bits. Several parts alternate between two halves of the memory, each with a CUDA stream of its own. At the
end of a part, a few long programs are still running, and the rest of the GPU already works on the other half.

B batch, H query heads, G KV heads, R = H / G group, N length, D head dim, S segment length, K slots, Z = B * segments.
"""

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from dma_kernels.attention.kernels.delta import launch_delta
from dma_kernels.attention.kernels.key_gradients import (
    KeyGradients,
    StoredScores,
    key_tile,
    launcher_of_key_gradients,
)
from dma_kernels.attention.kernels.query_gradients import launcher_of_query_gradients, list_key_tiles

_VARIABLE = "DMA_KERNEL_BACKWARD_MIB"
_MIB = 1024
_HALVES = 2


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
    of `out`. If `dquery_bias`, float32 `[B, H, N]`, is given, it receives the sum of dS over the keys of each query.
    """
    (batch, heads, length, head_dim), (z, kv_heads, keys) = q.shape, k.shape[:3]
    delta = launch_delta(out, grad_out)
    lists = list_key_tiles(birth, death, q, segment_length, key_tile=key_tile(q, keys))
    dq = torch.empty((batch, length, heads, head_dim), dtype=q.dtype, device=q.device).transpose(1, 2)
    gradients, columns = KeyGradients.like(k, v), heads // kv_heads * segment_length
    lines, parts, halves = cut_lines(z * kv_heads, keys * columns * q.element_size(), ds_bytes())
    ds = q.new_empty(halves, lines * keys, columns)
    launch_key_gradients = launcher_of_key_gradients(
        gradients, q, k, v, bias, birth, death, lse, delta, grad_out,
        scale=scale, segment_length=segment_length, read_block=lists.config.rows,
        rounded=dquery_bias is not None,
    )  # fmt: skip
    launch_query_gradients = launcher_of_query_gradients(
        k, lists, dq, scale=scale, segment_length=segment_length, dquery_bias=dquery_bias
    )
    with _streams(halves, q.device) as streams:
        for i in range(parts):
            half, first = i % halves, i * lines
            with streams[half]:
                stored = StoredScores(ds[half], first, min(lines, z * kv_heads - first))
                launch_key_gradients(stored)
                launch_query_gradients(stored)
    return dq, *gradients


def cut_lines(lines: int, line_bytes: int, limit: int) -> tuple[int, int, int]:
    """The maximum number of lines in a part, the number of parts, and how many parts are in memory at once.

    Args:
        lines: number of lines in all parts together.
        line_bytes: memory that dS of one line takes.
        limit: memory for dS, in bytes. A line that needs more still gets as much as it needs.
    """
    if lines * line_bytes <= limit:
        return lines, 1, 1
    halves = _HALVES if limit >= _HALVES * line_bytes else 1
    parts = -(-lines // max(1, limit // (halves * line_bytes)))
    lines = -(-lines // parts)  # parts of about the same size
    return lines, parts, halves


@contextlib.contextmanager
def _streams(count: int, device: torch.device) -> Iterator[list[contextlib.AbstractContextManager[None]]]:
    """`count` streams: the current one, and others that wait for it first and that it waits for at the end."""
    if device.type != "cuda":
        yield [contextlib.nullcontext() for _ in range(count)]
        return
    current = torch.cuda.current_stream(device)
    others = [torch.cuda.Stream(device) for _ in range(count - 1)]
    for other in others:
        other.wait_stream(current)
    try:
        yield [contextlib.nullcontext(), *(torch.cuda.stream(other) for other in others)]
    finally:
        for other in others:
            current.wait_stream(other)


def ds_bytes() -> int:
    """Maximum memory for dS in bytes, from the environment variable. A single line of dS may still take more.

    Raises:
        ValueError: if the variable is not a whole number above 0.
    """
    said = os.environ.get(_VARIABLE, str(_MIB))
    if not said.isdecimal() or not int(said):
        raise ValueError(f"{_VARIABLE}: expected a whole number of MiB above 0, got {said!r}; change or unset it")
    return int(said) << 20
