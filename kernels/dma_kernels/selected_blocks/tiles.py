"""Who attends to which block: queries in tiles with the blocks of all of them, and blocks with the tiles of theirs.

A tile is a few queries side by side, in all heads of a group. Its entries are the blocks that any of its queries has
chosen, each with a bit for each query that has.

B batch, G KV heads, N length, m chosen blocks of a query, T tiles, E entries of a tile, Z = B * G.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 16  # queries times heads of a group in a tile, at least
_CHUNK = 256  # entries of a block that one program passes over


class Tiles(NamedTuple):
    """What tiles of queries attend to.

    Attributes:
        queries: queries of a tile.
        block: number of the block of each entry, ascending, int32 `[Z, T, E]`; behind the last entry, the number of
            blocks.
        bits: bit i is set if query i of the tile has chosen the block, int32 `[Z, T, E]`.
        count: entries of each tile, int32 `[Z, T]`.
    """

    queries: int
    block: Tensor
    bits: Tensor
    count: Tensor  # type: ignore[assignment]  # in place of the method of tuples, which nobody calls here


def make_tiles(blocks: Tensor, group: int, number: int) -> Tiles:
    """Tiles of the blocks that queries have chosen, `[B, G, N, m]` of `number` blocks."""
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
    """Who has chosen a block: entries ordered by block, in chunks.

    Attributes:
        tile: tile of each entry, int32 `[Z, T * E]`.
        bits: as in `Tiles`, same shape.
        chunk_block: block of each chunk, int32 `[Z, chunks]`; behind the last, the number of blocks.
        chunk_start: first entry of each chunk, int32 `[Z, chunks]`.
        chunk_end: first entry behind it, same shape.
        first_chunk: first chunk of each block and behind all, int32 `[Z, blocks + 1]`.
    """

    tile: Tensor
    bits: Tensor
    chunk_block: Tensor
    chunk_start: Tensor
    chunk_end: Tensor
    first_chunk: Tensor


def find_choosers(tiles: Tiles, number: int) -> Choosers:
    """Entries of all tiles by block; each entry is one tile."""
    rows, entries = tiles.block.shape[0], tiles.block.shape[2]
    block, order = tiles.block.flatten(1).sort(dim=-1, stable=True)
    edges = torch.arange(number + 1, dtype=torch.int32, device=block.device).expand(rows, -1).contiguous()
    start = torch.searchsorted(block, edges)  # [Z, blocks + 1]
    chunks = (start[:, 1:] - start[:, :-1] + _CHUNK - 1) // _CHUNK
    first_chunk = F.pad(chunks.cumsum(-1), (1, 0))
    bound = number + block.shape[1] // _CHUNK  # of the number of chunks, known without looking
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
