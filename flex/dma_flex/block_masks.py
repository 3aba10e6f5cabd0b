"""Exact FlexAttention block masks from lifetimes, without evaluating any pair of query and key.

A key that lives in [birth, death) touches the blocks of queries from `birth // s` to `(death - 1) // s`, and covers
those from `ceil(birth / s)` to `death // s - 1`. A block of keys is empty for a block of queries that none of its keys
touches, full for one that all of its keys cover, and partial otherwise. This takes O(K + blocks) work per head;
`create_block_mask` takes O(N²).

B batch, H query heads, G KV heads, K keys, s block size, C blocks of keys, Q blocks of queries.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from dma_flex.mods import MaskMod, heads_per_row, lifetime_mask_mod
from dma_kernels import Lifetimes
from dma_kernels.launching import register_launch

_TABLE_NAMES = (
    *("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"),
    *("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices"),
)


def block_mask(lifetimes: Lifetimes, q_len: int, block_size: int = 128, num_heads: int | None = None) -> BlockMask:
    """The block mask of a mask for any `flex_attention` call, with keys in their natural order.

    Use it like this::

        flex_attention(q, k, v, block_mask=block_mask(lifetimes, N, num_heads=H), enable_gqa=True)

    It never waits for the device, works inside `torch.compile` too, and equals `create_block_mask` on the same mask.

    Args:
        lifetimes: the mask, for B or 1 sequences and G or 1 KV heads.
        q_len: N, the number of queries; must be the length of the mask.
        block_size: s, a power of two; N need not be a multiple of it.
        num_heads: H, query heads, a multiple of G; needed if G is more than 1.

    Returns:
        A BlockMask with one table per *query* head (or one for all, if the mask has one head).

    Raises:
        ValueError: if q_len is not the mask's length, the block size is not a power of two, or H is not a multiple of
            G or is missing although G is more than 1.
    """
    if q_len != lifetimes.length:
        raise ValueError(
            f"q_len: expected {lifetimes.length}, the length of the mask, got {q_len}; "
            "build lifetimes with the length of the queries"
        )
    return interval_block_mask(lifetimes.birth, lifetimes.death, q_len, block_size, num_heads)


def interval_block_mask(
    birth: Tensor, death: Tensor, q_len: int, block_size: int = 128, num_heads: int | None = None
) -> BlockMask:
    """The block mask of K keys that live in [birth, death) among `q_len` queries; K can differ from q_len.

    Args:
        birth: int32 `[B or 1, G or 1, K]`.
        death: int32, same shape.
        q_len: number of queries.
        block_size: s, a power of two.
        num_heads: H, query heads, a multiple of G; needed if G is more than 1.

    Raises:
        ValueError: if the block size is not a power of two, or shapes or heads do not match.
    """
    check_block_size(block_size)
    mask_mod = lifetime_mask_mod(birth, death, num_heads)
    if q_len < 1 or not death.numel():
        raise ValueError(f"expected at least one query, sequence, head and key, got {q_len} and {list(death.shape)}")
    tables = block_tables(birth, death, q_len, block_size, num_heads)
    return mask_of_tables(tables, mask_mod, (q_len, death.shape[-1]), block_size)


def mask_of_tables(
    tables: Sequence[Tensor], mask_mod: MaskMod, seq_lengths: tuple[int, int], block_size: int
) -> BlockMask:
    """A BlockMask from the tables of `block_tables`; `seq_lengths` are the numbers of queries and keys."""
    named: dict[str, Any] = dict(zip(_TABLE_NAMES, tables, strict=True))
    return BlockMask(
        seq_lengths=seq_lengths,
        **named,
        BLOCK_SIZE=(block_size, block_size),
        mask_mod=mask_mod,
    )


def _plain_tables(
    birth: Tensor, death: Tensor, q_len: int, block_size: int, num_heads: int | None = None
) -> list[Tensor]:
    """Copies of the reference's tables, since the outputs of an operation must not share memory."""
    return [x.clone() for x in block_tables_reference(birth, death, q_len, block_size, num_heads)]


@torch.library.custom_op("dma_flex::block_tables", mutates_args=())
def block_tables(
    birth: Tensor, death: Tensor, q_len: int, block_size: int, num_heads: int | None = None
) -> list[Tensor]:
    """The eight tables of a BlockMask in its order, int32, by query head (or one head for all).

    Triton kernels make them on CUDA, and `block_tables_reference` elsewhere; both give the same bits. Arguments as in
    `interval_block_mask`.

    Returns:
        The number of partial blocks of keys for each block of queries, `[B, H, Q]`, and their indices, `[B, H, Q, C]`;
        the same for full blocks; then all four again by blocks of keys, `[B, H, C]` and `[B, H, C, Q]`.
    """
    return _plain_tables(birth, death, q_len, block_size, num_heads)


@register_launch(block_tables, without_triton=_plain_tables)
def _(birth: Tensor, death: Tensor, q_len: int, block_size: int, num_heads: int | None = None) -> list[Tensor]:
    from dma_flex.triton_block_tables import launch_block_tables

    tables = empty_tables(death, q_len, block_size, num_heads)
    launch_block_tables(birth, death, tables, q_len=q_len, block_size=block_size)
    return tables


def block_tables_reference(
    birth: Tensor, death: Tensor, q_len: int, block_size: int, num_heads: int | None = None
) -> list[Tensor]:
    """`block_tables` in plain PyTorch, on any device; some of the tables share memory."""
    kinds = torch.stack(classify_blocks(birth, death, q_len, block_size))  # [2, B, G, C, Q]
    group = _table_heads(death, num_heads) // death.shape[1]
    tables = []
    for blocks in (kinds.mT, kinds):
        counts, indices = (x.repeat_interleave(group, dim=2) if group > 1 else x for x in _ordered(blocks))
        tables += [counts[0], indices[0], counts[1], indices[1]]
    return tables


def empty_tables(death: Tensor, q_len: int, block_size: int, num_heads: int | None = None) -> list[Tensor]:
    """Uninitialized tensors for the results of `block_tables`."""
    rows = death.shape[0], _table_heads(death, num_heads)
    q_blocks, key_blocks = -(-q_len // block_size), -(-death.shape[-1] // block_size)
    by_query, by_key = (q_blocks, key_blocks), (key_blocks, q_blocks)
    shapes = [shape for blocks in (by_query, by_key) for shape in 2 * (blocks[:1], blocks)]
    return [torch.empty(*rows, *shape, dtype=torch.int32, device=death.device) for shape in shapes]


@block_tables.register_fake
def _(birth: Tensor, death: Tensor, q_len: int, block_size: int, num_heads: int | None = None) -> list[Tensor]:
    return empty_tables(death, q_len, block_size, num_heads)


def _table_heads(death: Tensor, num_heads: int | None) -> int:
    """Query heads: FlexAttention on CUDA looks up head % table_heads, so tables by KV head would be wrong."""
    heads = death.shape[1]
    return heads * heads_per_row(heads, num_heads) if heads > 1 else 1


def classify_blocks(birth: Tensor, death: Tensor, q_len: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Which blocks are partial and which are full, two bool tensors `[B, G, C, Q]`.

    A block that reaches beyond the last query or key is never full, as in `create_block_mask`.
    """
    q_blocks, key_blocks = -(-q_len // block_size), -(-death.shape[-1] // block_size)
    birth, death = birth.clamp(0, q_len), death.clamp(0, q_len)
    lives = death > birth
    # Shifts instead of divisions: on a CPU, torch 2.13 compiles arange // s into code that gives wrong numbers.
    bits = block_size.bit_length() - 1
    begin, end = (birth + block_size - 1) >> bits, death >> bits  # the blocks that a key covers

    # +1 at the first block that a key touches, -1 after the last, summed along the queries.
    first, behind = birth >> bits, (death + block_size - 1) >> bits
    row = (torch.arange(death.shape[-1], device=death.device) >> bits) * (q_blocks + 1)
    steps = torch.zeros(*death.shape[:-1], key_blocks * (q_blocks + 1), dtype=torch.int32, device=death.device)
    steps = steps.scatter_add(-1, row + first, lives.int())
    steps = steps.scatter_add(-1, row + behind, -lives.int())
    touched = steps.unflatten(-1, (key_blocks, q_blocks + 1)).cumsum(-1, dtype=torch.int32)[..., :q_blocks] > 0

    # All keys of a block cover the blocks from the last of their beginnings to the first of their ends.
    missing = (0, -death.shape[-1] % block_size)
    begin = F.pad(begin, missing, value=0).unflatten(-1, (key_blocks, block_size)).amax(-1, keepdim=True)
    end = F.pad(end, missing, value=0).unflatten(-1, (key_blocks, block_size)).amin(-1, keepdim=True)
    q_block = torch.arange(q_blocks, dtype=torch.int32, device=death.device)
    full = (begin <= q_block) & (q_block < end)
    return touched & ~full, full


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are True, `[..., R]`, and the indices of these blocks, followed by the others."""
    seen = blocks.cumsum(-1, dtype=torch.int32)  # [..., R, C]
    place = torch.arange(1, blocks.shape[-1] + 1, dtype=torch.int32, device=blocks.device)
    count = seen[..., -1:]
    # The i-th True is at the first place where i of them have been seen, and likewise for the others.
    true = torch.searchsorted(seen, place.expand_as(seen).contiguous(), out_int32=True)
    false = torch.searchsorted(place - seen, place - count, out_int32=True)
    return count.squeeze(-1).contiguous(), torch.where(place <= count, true, false)


def check_block_size(block_size: int) -> None:
    """Raise `ValueError` unless the block size is a power of two."""
    if block_size < 1 or block_size & (block_size - 1):
        raise ValueError(f"block_size: expected a power of two, got {block_size}")
