"""Which tile of queries attends to which block, and the reverse: which tiles have chosen a block.

A tile is a few neighboring queries, in all heads of a group. Its entries are the blocks that any of its queries has
chosen. Each entry has one bit per query, which says whether that query has chosen the block.

B batch, G KV heads, N length, m chosen blocks of a query, T tiles, E entries of a tile, Z = B * G.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 16  # minimum number of rows in a tile: queries times heads of a group
_CHUNK = 256  # maximum number of a block's entries that one program passes over


class Tiles(NamedTuple):
    """What tiles of queries attend to.

    Attributes:
        queries: number of queries in a tile.
        block: number of the block of each entry, ascending, int32 `[Z, T, E]`; after the last entry, the number of
            blocks.
        bits: bit i is set if query i of the tile has chosen the block, int32 `[Z, T, E]`.
        count: number of entries of each tile, int32 `[Z, T]`.
    """

    queries: int
    block: Tensor
    bits: Tensor
    count: Tensor  # type: ignore[assignment]  # hides the method of tuples, which is not used here


def make_tiles(blocks: Tensor, group: int, number: int) -> Tiles:
    """Tiles from the blocks that queries have chosen, `[B, G, N, m]`, out of `number` blocks."""
    queries = max(1, ROWS >> (group - 1).bit_length())
    x = blocks.flatten(0, 1)
    x = F.pad(x, (0, 0, 0, -x.shape[1] % queries), value=-1)
    query = torch.arange(queries, device=x.device).repeat_interleave(x.shape[2])
    x = x.unflatten(1, (-1, queries)).flatten(2)  # [Z, T, E]
    key = torch.where(x < 0, number, x) * queries + query
    key = key.sort(dim=-1).values
    again = F.pad(key[..., 1:] == key[..., :-1], (1, 0))  # a block that a query names twice
    block, query = key // queries, key % queries
    new = torch.ones_like(block, dtype=torch.bool)
    new[..., 1:] = block[..., 1:] != block[..., :-1]
    entry = new.cumsum(-1) - 1
    real = block < number
    all_blocks = torch.full_like(block, number).scatter_(2, entry, block)
    bits = torch.zeros_like(block).scatter_add_(2, entry, torch.where(real & ~again, 1 << query, 0))
    return Tiles(queries, all_blocks.int(), bits.int(), (new & real).sum(-1, dtype=torch.int32))


class Choosers(NamedTuple):
    """Which tiles have chosen a block: entries sorted by block, in chunks.

    Attributes:
        tile: tile of each entry, int32 `[Z, T * E]`.
        bits: as in `Tiles`, same shape.
        chunk_block: block of each chunk, int32 `[Z, chunks]`; after the last chunk, the number of blocks.
        chunk_start: first entry of each chunk, int32 `[Z, chunks]`.
        chunk_end: first entry after each chunk, same shape.
        first_chunk: first chunk of each block, and the number of chunks at the end, int32 `[Z, blocks + 1]`.
    """

    tile: Tensor
    bits: Tensor
    chunk_block: Tensor
    chunk_start: Tensor
    chunk_end: Tensor
    first_chunk: Tensor


def find_choosers(tiles: Tiles, number: int) -> Choosers:
    """Entries of all tiles, sorted by block; each entry stands for one tile."""
    rows, entries = tiles.block.shape[0], tiles.block.shape[2]
    block, order = tiles.block.flatten(1).sort(dim=-1, stable=True)
    edges = torch.arange(number + 1, dtype=torch.int32, device=block.device).expand(rows, -1).contiguous()
    start = torch.searchsorted(block, edges)  # [Z, blocks + 1]
    chunks = (start[:, 1:] - start[:, :-1] + _CHUNK - 1) // _CHUNK
    first_chunk = F.pad(chunks.cumsum(-1), (1, 0))
    bound = number + block.shape[1] // _CHUNK  # at least the number of chunks, known without waiting for the device
    chunk = torch.arange(bound, device=block.device).expand(rows, -1).contiguous()
    chunk_block = torch.searchsorted(first_chunk[:, 1:].contiguous(), chunk, right=True)
    known = chunk_block.clamp(max=number - 1)
    chunk_start = start.gather(1, known) + (chunk - first_chunk.gather(1, known)) * _CHUNK
    chunk_end = torch.minimum(chunk_start + _CHUNK, start.gather(1, known + 1))
    return Choosers(
        (order // entries).int(),
        tiles.bits.flatten(1).gather(1, order),
        *(x.int() for x in (chunk_block, chunk_start, chunk_end, first_chunk)),
    )
