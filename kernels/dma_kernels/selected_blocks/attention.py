"""Attention in which every query chooses its own blocks of keys: the selected branch of native sparse attention.

The plain function gathers the keys of each query. The Triton kernels behind `block_attention` gather nothing: a tile is
made of neighboring queries, and passes once over each block that any of them has chosen.

B batch, H query heads, G KV heads, R = H / G group, n queries, M keys, m chosen blocks, D head dim.
"""

from typing import Any

import torch
from torch import Tensor

from dma_kernels.attention.ops import check_kernels_can, check_machine
from dma_kernels.checks import check_attention_inputs, check_no_tangents
from dma_kernels.launching import on_device_of_first
from dma_kernels.precision import without_autocast
from dma_kernels.reference import masked_average
from dma_kernels.selected_blocks.tiles import Tiles, make_tiles

BLOCK_SIZES = (16, 32, 64, 128)  # the sizes that the kernels take

_SHARED_BYTES = 128 * 128 * 4  # limit for a block of keys; the key gradients keep several blocks in shared memory


def kernels_take(block_size: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether the Triton kernels take blocks of this size."""
    return block_size in BLOCK_SIZES and block_size * head_dim * dtype.itemsize <= _SHARED_BYTES


def block_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    position: Tensor,
    first: Tensor,
    padding: Tensor,
    block_size: int,
) -> Tensor:
    """Softmax attention of each query to the tokens of its blocks from `first` up to itself; 0 if there are none.

    Args:
        q: `[B, H, n, D]`.
        k: `[B, G, M, D]`.
        v: `[B, G, M, D]`.
        blocks: numbers of the chosen blocks, int64 `[B, G, n, m]`. They are all different, except that -1 stands for
            no block.
        position: position of each query among the keys, int64 `[n]`.
        first: first position that a query may see, int64 `[B, n]`.
        padding: bool `[B, M]`, True for keys that no query sees.
        block_size: tokens of a block.

    Returns:
        `[B, H, n, D]`, in the dtype of q; computed in at least float32.
    """
    batch, kv_heads, count, dim = k.shape
    token = (blocks[..., None] * block_size + torch.arange(block_size, device=q.device)).flatten(3)  # [B, G, n, K]
    at = token.clamp(0, count - 1)
    visible = (token >= first[:, None, :, None]) & (token <= position[:, None]) & (token >= 0)
    visible = visible & ~padding.gather(1, at.flatten(1)).view_as(at)
    wide = torch.promote_types(q.dtype, torch.float32)

    def rows(x: Tensor) -> Tensor:
        taken = x.gather(2, at.flatten(2)[..., None].expand(-1, -1, -1, dim))
        return taken.view(batch, kv_heads, *at.shape[2:], dim).to(wide)  # [B, G, n, K, D]

    with without_autocast(q.device):
        by_group = q.unflatten(1, (kv_heads, -1)).transpose(2, 3).to(wide) * dim**-0.5  # [B, G, n, R, D]
        logits = by_group @ rows(k).transpose(-1, -2)
        out = masked_average(logits, visible[:, :, :, None].expand_as(logits), rows(v))
    return out.transpose(2, 3).flatten(1, 2).to(q.dtype)


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, first: Tensor, padding: Tensor | None, block_size: int
) -> Tensor:
    """`block_attention_reference` of a whole sequence by Triton kernels, differentiable once in q, k and v.

    It gives the same bits in every run. If one query of a tile has chosen a block, a NaN in v of that block shows in
    all queries of the tile, even in earlier ones. The N queries are at positions 0 … N-1 of the N keys.

    Args:
        q: `[B, H, N, D]`, float32, bfloat16 or float16.
        k: `[B, G, N, D]`.
        v: `[B, G, N, D]`.
        blocks: int64 `[B, G, N, m]`.
        first: int64 `[B, N]`.
        padding: bool `[B, N]`, or None if no key is padded.
        block_size: tokens of a block, one of `BLOCK_SIZES`.

    Raises:
        ValueError: if shapes, dtypes or devices do not match, or the kernels do not support them.
    """
    check_attention_inputs(q, k, v)
    check_no_tangents(q, k, v)
    expected = {
        "blocks": (blocks, (*k.shape[:3], blocks.shape[-1] if blocks.ndim else 0), torch.int64),
        "first": (first, (k.shape[0], k.shape[2]), torch.int64),
        "padding": (padding, (k.shape[0], k.shape[2]), torch.bool),
    }
    for name, (x, shape, dtype) in expected.items():
        if x is not None and (x.shape != shape or x.dtype != dtype or x.device != k.device):
            raise ValueError(
                f"{name}: expected {dtype} {list(shape)} on {k.device} for k {list(k.shape)}, "
                f"got {x.dtype} {list(x.shape)} on {x.device}"
            )
    check_kernels_can(q.dtype, q.shape[-1])
    if not kernels_take(block_size, q.shape[-1], q.dtype):
        raise ValueError(
            f"backend 'triton' takes blocks of {list(BLOCK_SIZES)} tokens and at most {_SHARED_BYTES} bytes, got "
            f"{block_size} tokens of head dim {q.shape[-1]} in {q.dtype}; use backend 'torch' for others"
        )
    tiles = make_tiles(blocks, q.shape[1] // k.shape[1], -(-k.shape[2] // block_size))
    out, _ = attend_blocks(q, k, v, *tiles, first.int(), padding, block_size)
    return out


@torch.library.custom_op("dma_kernels::attend_blocks", mutates_args=())
@on_device_of_first
def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: int,
    block: Tensor,
    bits: Tensor,
    count: Tensor,
    first: Tensor,
    padding: Tensor | None,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in base 2 `[B, H, N]`. Arguments as in `block_attention` and `Tiles`."""
    check_machine(q.device, q.dtype)  # here, since torch.compile cannot trace it
    from dma_kernels.selected_blocks.kernels import launch_attend_blocks

    tiles = Tiles(queries, block, bits, count)
    return launch_attend_blocks(q, k, v, tiles, first, padding, block_size=block_size)


@torch.library.custom_op("dma_kernels::attend_blocks_backward", mutates_args=())
@on_device_of_first
def attend_blocks_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: int,
    block: Tensor,
    bits: Tensor,
    count: Tensor,
    first: Tensor,
    padding: Tensor | None,
    block_size: int,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    from dma_kernels.selected_blocks.kernels import launch_attend_blocks_backward

    tiles = Tiles(queries, block, bits, count)
    return launch_attend_blocks_backward(q, k, v, tiles, first, padding, lse, out, grad_out, block_size=block_size)


@attend_blocks.register_fake
def _(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(q.shape[:3], dtype=torch.float32)


@attend_blocks_backward.register_fake
def _(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return dq, dk, dv


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    q, k, v, ctx.queries, *tensors, ctx.block_size = inputs
    ctx.save_for_backward(q, k, v, *tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 10
    q, k, v, *tensors, out, lse = ctx.saved_tensors
    gradients = attend_blocks_backward(grad_out, q, k, v, ctx.queries, *tensors, ctx.block_size, out, lse)
    return *gradients, *[None] * 7


attend_blocks.register_autograd(_backward, setup_context=_save_for_backward)
