"""The number of tiles of slots that each tile of queries needs, counted once for all heads that share a mask.

B batch, G KV heads, S segment length, C snapshot slots, K = C + S slots, Z = B * segments.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # slots that a program loads at once
_TILES = 4  # tiles of queries per program

NEVER = tl.constexpr(2147483647)


@triton.jit(do_not_specialize=("tiles",))
def _count_tiles_kernel(
    p_birth, p_death, p_count, snapshot, keys, segment, tiles,
    POSITIONS: tl.constexpr, BLOCK_K: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The counts full, own_full, partial and own_partial of several tiles of queries of one segment and head."""
    i_line = tl.program_id(0).to(tl.int64)
    o_tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    first, end = (o_tile * POSITIONS)[:, None], tl.minimum((o_tile + 1) * POSITIONS, segment)[:, None]
    p_birth += i_line * keys
    p_death += i_line * keys
    b_all, b_any, b_own = tl.zeros([TILES], tl.int32), tl.zeros([TILES], tl.int32), tl.zeros([TILES], tl.int32)
    b_unseen = tl.full([TILES], NEVER, tl.int32)
    for i in range(0, tl.maximum(snapshot, keys - snapshot), BLOCK):  # both in one loop, so that their loads overlap
        o_k = i + tl.arange(0, BLOCK)
        m_own = o_k < keys - snapshot
        b_death = tl.load(p_death + o_k, mask=o_k < snapshot, other=0)[None, :]
        b_own_birth = tl.load(p_birth + snapshot + o_k, mask=m_own, other=NEVER)[None, :]
        b_own_death = tl.load(p_death + snapshot + o_k, mask=m_own, other=0)[None, :]
        b_all += tl.sum((b_death >= end).to(tl.int32), 1)
        b_any += tl.sum((b_death > first).to(tl.int32), 1)
        b_own += tl.sum((b_own_birth < end).to(tl.int32), 1)
        seen_by_all = (b_own_birth <= first) & (b_own_death >= end)
        b_unseen = tl.minimum(b_unseen, tl.min(tl.where(seen_by_all, NEVER, o_k[None, :]), 1))
    full, own_full = b_all // BLOCK_K, tl.minimum(b_unseen, keys - snapshot) // BLOCK_K
    partial, own_partial = tl.cdiv(b_any, BLOCK_K) - full, tl.cdiv(b_own, BLOCK_K) - own_full
    own_partial = tl.where(full + own_full + partial + own_partial == 0, 1, own_partial)
    p_tile, m_tile = p_count + (i_line * tiles + o_tile) * 4, o_tile < tiles
    tl.store(p_tile, full, mask=m_tile)
    tl.store(p_tile + 1, own_full, mask=m_tile)
    tl.store(p_tile + 2, partial, mask=m_tile)
    tl.store(p_tile + 3, own_partial, mask=m_tile)


def launch_count_tiles(birth: Tensor, death: Tensor, *, segment_length: int, positions: int, block_k: int) -> Tensor:
    """Four numbers of tiles for each tile of queries, int32 `[Z, G or 1, S / positions, 4]`.

    Their order is full, own_full, partial, own_partial. All queries of the tile see the first `full` tiles of the
    snapshot, from slot 0 on, so these need no mask. The next `partial` tiles reach to the last slot that any of these
    queries sees. `own_full` and `own_partial` count the tiles of own keys in the same way, from slot C on. If all four
    would be 0, own_partial is 1.

    Args:
        birth: first query of the segment that sees a slot, int32 `[Z, G or 1, K]`; own slots in order of birth.
        death: first later query that no longer sees it, same shape; snapshot slots in descending order.
        segment_length: S.
        positions: number of positions in a tile of queries; S is a multiple of it.
        block_k: number of slots in a tile; C and S are multiples of it.
    """
    (z, heads, keys), tiles = birth.shape, segment_length // positions
    count = torch.empty(z, heads, tiles, 4, dtype=torch.int32, device=birth.device)
    _count_tiles_kernel[(z * heads, triton.cdiv(tiles, _TILES))](
        birth, death, count, keys - segment_length, keys, segment_length, tiles,
        POSITIONS=positions, BLOCK_K=block_k, TILES=_TILES, BLOCK=_BLOCK,
    )  # fmt: skip
    return count
