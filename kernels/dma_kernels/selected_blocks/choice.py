"""Which blocks each query of native sparse attention chooses: the most important ones, and a few always.

The plain function makes the weights of all compressed blocks, and sorts. The Triton kernel behind `choose_blocks` keeps
the best blocks of each query while it passes over the compressed keys. `grid.py` says what the blocks are.

B batch, H query heads, G KV heads, R = H / G group, n queries, N length, Nc compressed blocks, Nb selection blocks,
m chosen blocks, D head dim.
"""

import torch
from torch import Tensor

from dma_kernels.attention.ops import check_kernels_can, check_machine
from dma_kernels.launching import register_launch
from dma_kernels.precision import without_autocast
from dma_kernels.ranks import ordered_bits
from dma_kernels.selected_blocks.grid import FORCED, NO_BLOCK, BlockSizes, Seen, sees_compressed

MAX_GROUP, MAX_CHOSEN, MAX_SHARING = 32, 128, 32  # what the kernel takes; more would not fit into registers

_WEIGHED = 1 << 26  # limit for weights of compressed blocks in memory at once


def choose_blocks_reference(
    q: Tensor, compressed_keys: Tensor, position: Tensor, seen: Seen, keys: int, sizes: BlockSizes
) -> Tensor:
    """The blocks of each query, int64 `[B, G, n, m]`, the best first; -1 where there are fewer.

    The importance of a block is the attention, summed over the heads of a group, to the compressed blocks that
    overlap it. It is compared with 16 mantissa bits, and of equal blocks the later is chosen. All heads of a group
    choose the same blocks.

    Args:
        q: `[B, H, n, D]`, rotated.
        compressed_keys: `[B, G, Nc, D]`.
        position: position of each query, int64 `[n]`.
        seen: what each query sees.
        keys: number of tokens, from position 0.
        sizes: sizes of the blocks.
    """
    weights = _group_weights(q, compressed_keys, sees_compressed(position, seen.run, seen.block_run, sizes))
    importance = sizes.importance(weights, keys)  # [B, G, n, Nb]
    block = torch.arange(importance.shape[-1], device=q.device)
    own = (position // sizes.select_block)[:, None]
    first = (seen.first // sizes.select_block)[:, :, None]
    candidate = (block <= own) & (block >= first)
    forced = candidate & ((block == first) | (block >= own - 1))
    order = (torch.where(forced[:, None], FORCED, ordered_bits(importance)).long() << 32) + block
    order = order.masked_fill(~candidate[:, None], NO_BLOCK)
    chosen = order.topk(sizes.chosen(keys), dim=-1)
    return chosen.indices.masked_fill(chosen.values < 0, NO_BLOCK)


def _group_weights(q: Tensor, compressed_keys: Tensor, visible: Tensor) -> Tensor:
    """Attention to compressed keys, summed over the heads of a group, float `[B, G, n, Nc]`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    by_group = q.unflatten(1, (compressed_keys.shape[1], -1)).to(wide)  # [B, G, R, n, D]
    with without_autocast(q.device):
        logits = by_group @ compressed_keys[:, :, None].transpose(-1, -2).to(wide) * q.shape[-1] ** -0.5
    visible = visible[:, :, None]
    weights = logits.masked_fill(~visible, -torch.inf).softmax(-1)
    return weights.masked_fill(~visible.any(-1, keepdim=True), 0).sum(2).float()


def kernel_takes(sizes: BlockSizes, group: int) -> bool:
    """Whether the Triton kernel chooses blocks of these sizes for groups of this many heads."""
    sharing = sizes.before + sizes.step
    return group <= MAX_GROUP and sizes.select_count <= MAX_CHOSEN and sharing <= MAX_SHARING


@torch.no_grad()
def choose_blocks(q: Tensor, compressed_keys: Tensor, seen: Seen, sizes: BlockSizes) -> Tensor:
    """`choose_blocks_reference` of a whole sequence; on CUDA by a Triton kernel, in memory that is linear in N.

    The N queries are at positions 0 … N-1 of the N tokens. Importances differ from those of the plain function by
    rounding, so blocks whose importances are equal to about 16 mantissa bits can be chosen differently. It has no
    gradient.

    Args:
        q: `[B, H, N, D]`, float32, bfloat16 or float16, rotated.
        compressed_keys: `[B, G, Nc, D]`, where Nc is the number of whole compressed blocks in N tokens.
        seen: what each query sees.
        sizes: sizes of the blocks.

    Returns:
        int64 `[B, G, N, m]`, as from `choose_blocks_reference`.

    Raises:
        ValueError: if shapes, dtypes or devices do not match, or the kernel does not support them.
    """
    _check_inputs(q, compressed_keys, seen, sizes)
    check_kernels_can(q.dtype, q.shape[-1])
    group = q.shape[1] // compressed_keys.shape[1]
    if not kernel_takes(sizes, group):
        raise ValueError(
            f"expected at most {MAX_GROUP} heads of a group, {MAX_CHOSEN} chosen blocks, and {MAX_SHARING} compressed "
            f"blocks that share tokens with a block, got {group}, {sizes.select_count} and "
            f"{sizes.before + sizes.step}; use choose_blocks_reference for these"
        )
    return best_blocks(
        q, compressed_keys, *seen, sizes.compress_block, sizes.compress_stride, sizes.select_block, sizes.select_count
    )


def _check_inputs(q: Tensor, compressed_keys: Tensor, seen: Seen, sizes: BlockSizes) -> None:
    """Raise `ValueError` unless shapes, dtypes and devices match."""
    if q.ndim != 4 or compressed_keys.ndim != 4:
        raise ValueError(
            f"expected q [B, H, N, D] and compressed_keys [B, G, Nc, D], got {list(q.shape)} and "
            f"{list(compressed_keys.shape)}"
        )
    batch, heads, length, head_dim = q.shape
    kv_heads, blocks = compressed_keys.shape[1], sizes.compressed(length)
    expected = {
        "compressed_keys": (compressed_keys, (batch, kv_heads, blocks, head_dim)),
        "run": (seen.run, (batch, length)),
        "first": (seen.first, (batch, length)),
        "block_run": (seen.block_run, (batch, blocks)),
    }
    for name, (x, shape) in expected.items():
        if x.shape != shape or x.device != q.device:
            raise ValueError(
                f"{name}: expected {list(shape)} on {q.device} for q {list(q.shape)} and blocks of {sizes}, "
                f"got {list(x.shape)} on {x.device}"
            )
    for name in ("run", "first", "block_run"):
        x = getattr(seen, name)
        if x.is_floating_point() or x.dtype == torch.bool:
            raise ValueError(f"{name}: expected integers, got {x.dtype}")
    if head_dim == 0 or kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"expected a head dim of at least 1 and a multiple of the KV heads as query heads, got q {list(q.shape)} "
            f"and {kv_heads} KV heads"
        )
    if compressed_keys.dtype != q.dtype:
        raise ValueError(f"compressed_keys: expected {q.dtype} as q, got {compressed_keys.dtype}; convert one of them")


def best_blocks_reference(
    q: Tensor,
    compressed_keys: Tensor,
    run: Tensor,
    first: Tensor,
    block_run: Tensor,
    compress_block: int,
    compress_stride: int,
    select_block: int,
    select_count: int,
) -> Tensor:
    """`choose_blocks_reference`, for a limited number of queries at a time to save memory."""
    sizes, seen = BlockSizes(compress_block, compress_stride, select_block, select_count), Seen(run, first, block_run)
    batch, heads, length = q.shape[:3]
    rows = max(16, _WEIGHED // max(1, batch * heads * block_run.shape[1]))
    position = torch.arange(length, device=q.device)
    out = q.new_empty(batch, compressed_keys.shape[1], length, sizes.chosen(length), dtype=torch.int64)
    for start in range(0, length, rows):
        here = slice(start, start + rows)
        part = seen.queries(start, start + rows)
        out[:, :, here] = choose_blocks_reference(q[:, :, here], compressed_keys, position[here], part, length, sizes)
    return out


@torch.library.custom_op("dma_kernels::best_blocks", mutates_args=())
def best_blocks(
    q: Tensor,
    compressed_keys: Tensor,
    run: Tensor,
    first: Tensor,
    block_run: Tensor,
    compress_block: int,
    compress_stride: int,
    select_block: int,
    select_count: int,
) -> Tensor:
    """`choose_blocks`, opaque to torch.compile; arguments as in `Seen` and `BlockSizes`."""
    return best_blocks_reference(
        q, compressed_keys, run, first, block_run, compress_block, compress_stride, select_block, select_count
    )


@register_launch(best_blocks, without_triton=best_blocks_reference)
def _(q: Tensor, compressed_keys: Tensor, run: Tensor, first: Tensor, block_run: Tensor, *sizes: int) -> Tensor:
    check_machine(q.device, q.dtype)  # here, since torch.compile cannot trace it
    from dma_kernels.selected_blocks.choice_kernels import launch_best_blocks

    return launch_best_blocks(q, compressed_keys, Seen(run, first, block_run), BlockSizes(*sizes))


@best_blocks.register_fake
def _(
    q: Tensor, compressed_keys: Tensor, run: Tensor, first: Tensor, block_run: Tensor,
    compress_block: int, compress_stride: int, select_block: int, select_count: int,
) -> Tensor:  # fmt: skip
    chosen = min(select_count, -(-q.shape[2] // select_block))
    return q.new_empty(q.shape[0], compressed_keys.shape[1], q.shape[2], chosen, dtype=torch.int64)
