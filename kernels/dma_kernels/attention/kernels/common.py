"""Code that the attention kernels share: tiles of queries, the slots that they see, logits, and tensor descriptors.

In the forward kernel, each row of a tile of queries is one position and one head of the group: row r is query r // R of
the segment, in head r % R. So the heads that share keys load them only once.

B batch, H query heads, G KV heads, R = H / G group, N length, D head dim, T segments, S segment length, C snapshot
slots, K = C + S slots, Z = B * T.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dma_kernels.primitives import LOG2_E, scaled_products

# Sizes that Triton does not specialize, so new values compile nothing. The length is specialized: if it is a multiple
# of 16, loads are wider.
SIZES = ("kv_heads", "mask_heads", "group", "segments")


@triton.jit
def locate_rows(kv_heads, group, length, segments, segment, BLOCK_M: tl.constexpr):
    """What a program works on: segment and KV head (as one number, then as two), sequence, tile, rows and real rows."""
    tiles = tl.cdiv(segment * group, BLOCK_M)
    i_zg, i_tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    i_z, i_g = i_zg // kv_heads, i_zg % kv_heads
    i_b = (i_z // segments).to(tl.int64)
    o_row = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    o_t, o_h = o_row // group, (i_g * group + o_row % group).to(tl.int64)
    o_n = (i_z % segments * segment + o_t).to(tl.int64)
    m_row = (o_t < segment) & (o_n < length)
    return i_zg, i_z, i_g, i_b, i_tile, o_t, o_h, o_n, m_row


@triton.jit
def count_slot_tiles(
    p_birth, p_death, snapshot, keys, i_tile, group, segment, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Count the tiles of slots that a tile of queries needs: full, own_full, partial, own_partial.

    All queries see the first `full` tiles of the snapshot, so these need no mask. The next `partial` tiles reach to the
    last slot that any query sees, and need a mask. The other two counts are the same for the own keys.
    """
    first = i_tile * BLOCK_M // group
    end = tl.minimum((i_tile * BLOCK_M + BLOCK_M - 1) // group + 1, segment)
    BLOCK: tl.constexpr = 1024
    b_all, b_any, b_own = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    b_unseen = tl.full([BLOCK], 2147483647, tl.int32)
    for i in range(0, tl.maximum(snapshot, keys - snapshot), BLOCK):  # both in one loop, so that their loads overlap
        o_k = i + tl.arange(0, BLOCK)
        m_own = o_k < keys - snapshot
        b_death = tl.load(p_death + o_k, mask=o_k < snapshot, other=0)
        b_own_birth = tl.load(p_birth + snapshot + o_k, mask=m_own, other=2147483647)
        b_own_death = tl.load(p_death + snapshot + o_k, mask=m_own, other=0)
        b_all += (b_death >= end).to(tl.int32)
        b_any += (b_death > first).to(tl.int32)
        b_own += (b_own_birth < end).to(tl.int32)
        seen_by_all = (b_own_birth <= first) & (b_own_death >= end)
        b_unseen = tl.minimum(b_unseen, tl.where(seen_by_all, 2147483647, o_k))
    full, own_full = tl.sum(b_all) // BLOCK_K, tl.minimum(tl.min(b_unseen), keys - snapshot) // BLOCK_K
    return full, own_full, tl.cdiv(tl.sum(b_any), BLOCK_K) - full, tl.cdiv(tl.sum(b_own), BLOCK_K) - own_full


@triton.jit
def slot_of(i, tiles, first, own_first, BLOCK_K: tl.constexpr):
    """First slot of the i-th tile: `tiles` tiles of the snapshot, from slot `first`, then own keys from `own_first`."""
    return tl.where(i < tiles, first + i * BLOCK_K, own_first + (i - tiles) * BLOCK_K)


@triton.jit
def tile_logits(
    b_q, b_k, p_bias, p_birth, p_death, i_slot, o_t, scale,
    BLOCK_K: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits of a tile in base 2, [BLOCK_M, BLOCK_K]; -inf where a query does not see a key."""
    o_k = i_slot + tl.arange(0, BLOCK_K)
    b_bias = tl.load(p_bias + o_k) * LOG2_E
    b_logits = scaled_products(b_q, b_k, scale, PRECISION) + b_bias[None, :]
    if MASKED:
        b_birth, b_death = tl.load(p_birth + o_k), tl.load(p_death + o_k)
        visible = (b_birth[None, :] <= o_t[:, None]) & (o_t[:, None] < b_death[None, :])
        b_logits = tl.where(visible, b_logits, -float("inf"))
    return b_logits


def slot_tiles(x: Tensor, block_k: int, block_d: int) -> TensorDescriptor:
    """A descriptor of `[Z, G, K, D]`, as a matrix with a row for each slot, in tiles of slots."""
    lines = x.view(-1, x.shape[-1])
    return TensorDescriptor(lines, list(lines.shape), list(lines.stride()), [block_k, block_d])


def query_tiles(x: Tensor, block_s: int, block_d: int) -> TensorDescriptor:
    """A descriptor of `[B, H, N, D]`, in tiles of positions of one head."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, block_s, block_d])


def ds_tiles(ds: Tensor, block_k: int, block_s: int) -> TensorDescriptor:
    """A descriptor of dS, `[lines * K, R * S]`, in tiles of slots by queries of one head."""
    return TensorDescriptor(ds, list(ds.shape), list(ds.stride()), [block_k, block_s])


def slot_block(largest: int, *slots: int) -> int:
    """The number of slots in a tile: at most `largest`, and a divisor of each of the given numbers of slots."""
    block = math.gcd(largest, *slots)
    assert block >= 16, "slots come in multiples of 16"
    return block


def aligned(x: Tensor) -> Tensor:
    """`x`, or a copy if a tensor descriptor cannot address it.

    The last dim must have stride 1. The other strides and the address must be multiples of 16 bytes.
    """
    step = 16 // x.element_size()
    strides = [stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    fits = x.stride(-1) == 1 and all(stride > 0 and stride % step == 0 for stride in strides)
    fits = fits and all(stride % step == 0 for stride in x.stride()[:-1]) and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)
