"""The forward pass for Hopper, in Gluon: a persistent, warp-specialized kernel.

One program per multiprocessor processes many work items, one after the other. One of its warps loads tiles, and two
groups of four warps multiply them. A work item is a tile of 128 rows: 2 P positions, each in the R heads of a group,
where P = 64 / R. Each group of warps holds 64 of the rows; its row r is head r // P and position r % P.

Tiles of queries, keys, values and biases are loaded by TMA into buffers in shared memory. Births and deaths are loaded
only for tiles that need a mask. Each buffer has two barriers: one says that it is full, the other that it is empty and
may be overwritten. There are buffers for two tiles of queries and for `STAGES` tiles of slots, so the loading warp runs
ahead, also across work items. While a group computes the softmax weights of one tile, the tensor cores multiply the
weights of the tile before by its values.

Gluon is a part of Triton that may change. This kernel has run on Triton 3.6.0. Where it cannot be imported,
`forward.py` takes its place.

B batch, H query heads, G KV heads, R = H / G group, N length, D head dim, S segment length, K slots, Z = B * segments.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dma_kernels.segments.tile_counts import launch_count_tiles

BLOCK_K = 128  # slots in a tile
_STAGES = {64: 4, 128: 2}  # by head dim; as many as fit into 227 KB of shared memory
_LINES = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)  # layout of biases, births and deaths


class _Inputs(NamedTuple):
    """Descriptors of the inputs in global memory; a second instance holds their buffers in shared memory."""

    q: Any
    k: Any
    v: Any
    bias: Any
    birth: Any
    death: Any


class _Barriers(NamedTuple):
    """Barriers of the buffers of queries, keys and values. Those of keys also cover biases, births and deaths."""

    q_full: Any
    q_empty: Any
    k_full: Any
    k_empty: Any
    v_full: Any
    v_empty: Any


class _Sizes(NamedTuple):
    """Sizes of the problem. `tiles` is the number of tiles of queries in a segment."""

    items: Any
    tiles: Any
    kv_heads: Any
    mask_heads: Any
    segments: Any
    segment: Any
    snapshot: Any
    keys: Any
    length: Any


class _Item(NamedTuple):
    """A work item: segment, KV head, both as one number, tile of queries, line of the mask, numbers of slot tiles."""

    z: Any
    g: Any
    line: Any
    tile: Any
    mask_line: Any
    full: Any
    own_full: Any
    partial: Any
    own_partial: Any


@gluon.jit
def _locate_item(item, sizes, p_count):
    line = item // sizes.tiles
    tile = item % sizes.tiles
    z = line // sizes.kv_heads
    g = line % sizes.kv_heads
    mask_line = z * sizes.mask_heads + g % sizes.mask_heads
    p = p_count + (mask_line * sizes.tiles + tile) * 4
    return _Item(z, g, line, tile, mask_line, gl.load(p), gl.load(p + 1), gl.load(p + 2), gl.load(p + 3))


@gluon.jit
def _slot_of(i, item, snapshot, BLOCK_K: gl.constexpr):
    """First slot of the i-th tile. Tiles without a mask come first; of each kind, those of the snapshot come first."""
    k = i - item.full - item.own_full
    unmasked = gl.where(i < item.full, i * BLOCK_K, snapshot + (i - item.full) * BLOCK_K)
    of_snapshot, own = item.full + k, item.own_full + k - item.partial
    masked = gl.where(k < item.partial, of_snapshot * BLOCK_K, snapshot + own * BLOCK_K)
    return gl.where(k < 0, unmasked, masked)


@gluon.jit
def _load(
    inputs, shared, barriers, p_count, sizes,
    BLOCK_K: gl.constexpr, D: gl.constexpr, R: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The loading warp: load the tiles of all work items of this program."""
    P: gl.constexpr = 64 // R
    n_tile = 0
    n_item = 0
    for i_item in range(gl.program_id(0), sizes.items, gl.num_programs(0)):
        item = _locate_item(i_item, sizes, p_count)
        half = n_item & 1
        q_full = barriers.q_full.index(half)
        i_b = item.z // sizes.segments
        position = item.z % sizes.segments * sizes.segment + item.tile * (2 * P)
        mbarrier.wait(barriers.q_empty.index(half), ((n_item >> 1) & 1) ^ 1)
        mbarrier.expect(q_full, 128 * D * 2)
        for c in gl.static_range(2):
            tma.async_copy_global_to_shared(
                inputs.q, [i_b, item.g * R, position + c * P, 0], q_full, shared.q.index(half * 2 + c)
            )
        unmasked = item.full + item.own_full
        for i in range(unmasked + item.partial + item.own_partial):
            stage = n_tile % STAGES
            phase = ((n_tile // STAGES) & 1) ^ 1
            k_full, v_full = barriers.k_full.index(stage), barriers.v_full.index(stage)
            slot = _slot_of(i, item, sizes.snapshot, BLOCK_K)
            row = item.line * sizes.keys + slot
            masked = i >= unmasked
            mbarrier.wait(barriers.k_empty.index(stage), phase)
            mbarrier.expect(k_full, BLOCK_K * (D * 2 + 4), pred=i < unmasked)
            mbarrier.expect(k_full, BLOCK_K * (D * 2 + 12), pred=masked)
            tma.async_copy_global_to_shared(inputs.k, [row, 0], k_full, shared.k.index(stage))
            tma.async_copy_global_to_shared(inputs.bias, [item.line, slot], k_full, shared.bias.index(stage))
            lived = [item.mask_line, slot]
            tma.async_copy_global_to_shared(inputs.birth, lived, k_full, shared.birth.index(stage), pred=masked)
            tma.async_copy_global_to_shared(inputs.death, lived, k_full, shared.death.index(stage), pred=masked)
            mbarrier.wait(barriers.v_empty.index(stage), phase)
            mbarrier.expect(v_full, BLOCK_K * D * 2)
            tma.async_copy_global_to_shared(inputs.v, [row, 0], v_full, shared.v.index(stage))
            n_tile += 1
        n_item += 1  # noqa: SIM113


@gluon.jit
def _logits(products, shared, stage, masked, o_t, scale, BLOCK_K: gl.constexpr, COLUMNS: gl.constexpr):
    """Logits of a tile in base 2, [64, BLOCK_K]; -inf where a query does not see a key."""
    bias = shared.bias.index(stage).reshape((BLOCK_K,)).load(COLUMNS)
    logits = products * scale + bias[None, :]
    if masked:
        birth = shared.birth.index(stage).reshape((BLOCK_K,)).load(COLUMNS)
        death = shared.death.index(stage).reshape((BLOCK_K,)).load(COLUMNS)
        visible = (birth[None, :] <= o_t[:, None]) & (o_t[:, None] < death[None, :])
        logits = gl.where(visible, logits, -float("inf"))
    return logits


@gluon.jit
def _finite_shift(maximum):
    """The number to subtract from logits: their maximum, or 0 if no key is seen, so that weights are 0 and not NaN."""
    return gl.where(maximum == -float("inf"), 0.0, maximum)


@gluon.jit
def _multiply(
    shared, barriers, d_out, p_lse, p_count, sizes, scale,
    C: gl.constexpr, BLOCK_K: gl.constexpr, D: gl.constexpr, R: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Group C of the multiplying warps: compute its 64 rows of all work items of this program."""
    P: gl.constexpr = 64 // R
    DTYPE: gl.constexpr = shared.q.dtype
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    QUERIES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], DTYPE)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, LOGITS)
    scale = scale * 1.4426950408889634
    zero = gl.zeros([64, BLOCK_K], gl.float32, LOGITS)
    o_row = gl.arange(0, 64, gl.SliceLayout(1, LOGITS))
    n_tile = 0
    n_item = 0
    for i_item in range(gl.program_id(0), sizes.items, gl.num_programs(0)):
        item = _locate_item(i_item, sizes, p_count)
        unmasked = item.full + item.own_full
        count = unmasked + item.partial + item.own_partial
        o_t = item.tile * (2 * P) + C * P + o_row % P
        half = n_item & 1
        i_b = item.z // sizes.segments
        q = shared.q.index(half * 2 + C)._reinterpret(DTYPE, [64, D], QUERIES)
        mbarrier.wait(barriers.q_full.index(half), (n_item >> 1) & 1)
        # The first tile: there are no weights yet to multiply at the same time.
        stage = n_tile % STAGES
        mbarrier.wait(barriers.k_full.index(stage), (n_tile // STAGES) & 1)
        s = warpgroup_mma(q, shared.k.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        logits = _logits(s, shared, stage, unmasked == 0, o_t, scale, BLOCK_K, COLUMNS)
        mbarrier.arrive(barriers.k_empty.index(stage), count=1)
        maximum = gl.max(logits, 1)
        weights = gl.exp2(logits - _finite_shift(maximum)[:, None])
        total = gl.sum(weights, 1)
        out = gl.zeros([64, D], gl.float32, OUT)
        tma.store_wait(0)  # until the last output has left its buffer, which is also that of its queries
        mbarrier.arrive(barriers.q_empty.index(half ^ 1), count=1, pred=n_item > 0)
        mbarrier.wait(barriers.k_full.index((n_tile + 1) % STAGES), ((n_tile + 1) // STAGES) & 1, pred=count > 1)
        for i in range(1, count):
            before = n_tile % STAGES
            phase = (n_tile // STAGES) & 1
            n_tile += 1
            stage = n_tile % STAGES
            operand = gl.convert_layout(weights.to(DTYPE), WEIGHTS)
            s = warpgroup_mma(q, shared.k.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
            mbarrier.wait(barriers.v_full.index(before), phase)
            product = warpgroup_mma(operand, shared.v.index(before), out, is_async=True)
            s = warpgroup_mma_wait(1, deps=(s,))
            logits = _logits(s, shared, stage, i >= unmasked, o_t, scale, BLOCK_K, COLUMNS)
            mbarrier.arrive(barriers.k_empty.index(stage), count=1)
            new = gl.maximum(maximum, gl.max(logits, 1))
            shift = _finite_shift(new)
            weights = gl.exp2(logits - shift[:, None])
            decay = gl.exp2(maximum - shift)
            total = total * decay + gl.sum(weights, 1)
            maximum = new
            # This wait ends a basic block. Otherwise ptxas would move the wait for the product above the exponentials.
            mbarrier.wait(
                barriers.k_full.index((n_tile + 1) % STAGES), ((n_tile + 1) // STAGES) & 1, pred=i + 1 < count
            )
            out = warpgroup_mma_wait(0, deps=(product,))
            mbarrier.arrive(barriers.v_empty.index(before), count=1)
            out = out * gl.convert_layout(decay, gl.SliceLayout(1, OUT))[:, None]
        before = n_tile % STAGES
        mbarrier.wait(barriers.v_full.index(before), (n_tile // STAGES) & 1)
        operand = gl.convert_layout(weights.to(DTYPE), WEIGHTS)
        product = warpgroup_mma(operand, shared.v.index(before), out, is_async=True)
        o_n = item.z % sizes.segments * sizes.segment + o_t
        lse = gl.where(total == 0.0, -float("inf"), maximum + gl.log2(total))
        p_row = p_lse + (i_b * sizes.kv_heads * R + item.g * R + o_row // P).to(gl.int64) * sizes.length + o_n
        gl.store(p_row, lse, mask=o_n < sizes.length)
        factor = 1.0 / gl.where(total == 0.0, 1.0, total)
        out = warpgroup_mma_wait(0, deps=(product,))
        mbarrier.arrive(barriers.v_empty.index(before), count=1)
        out = out * gl.convert_layout(factor, gl.SliceLayout(1, OUT))[:, None]
        q.store(out.to(DTYPE))
        fence_async_shared()
        position = item.z % sizes.segments * sizes.segment + item.tile * (2 * P) + C * P
        tma.async_copy_shared_to_global(d_out, [i_b, item.g * R, position, 0], shared.q.index(half * 2 + C))
        n_tile += 1
        n_item += 1  # noqa: SIM113
    tma.store_wait(0)


@gluon.jit
def _multiply_first(
    shared, barriers, d_out, p_lse, p_count, sizes, scale,
    BLOCK_K: gl.constexpr, D: gl.constexpr, R: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    _multiply(shared, barriers, d_out, p_lse, p_count, sizes, scale, 0, BLOCK_K, D, R, STAGES)


@gluon.jit
def _multiply_second(
    shared, barriers, d_out, p_lse, p_count, sizes, scale,
    BLOCK_K: gl.constexpr, D: gl.constexpr, R: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    _multiply(shared, barriers, d_out, p_lse, p_count, sizes, scale, 1, BLOCK_K, D, R, STAGES)


@gluon.jit
def _make_barriers(count: gl.constexpr, arrivals: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [count, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(count):
        mbarrier.init(barriers.index(i), count=arrivals)
    return barriers


@gluon.jit(do_not_specialize=["items", "tiles", "kv_heads", "mask_heads", "segments"])
def _forward_kernel(
    d_q, d_k, d_v, d_bias, d_birth, d_death, d_out, p_lse, p_count,
    items, tiles, kv_heads, mask_heads, segments, segment, snapshot, keys, length, scale,
    BLOCK_K: gl.constexpr, D: gl.constexpr, R: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of all work items; of n programs, each takes every n-th item."""
    shared = _Inputs(
        gl.allocate_shared_memory(d_q.dtype, [4, 1, R, 64 // R, D], d_q.layout),
        gl.allocate_shared_memory(d_k.dtype, [STAGES, BLOCK_K, D], d_k.layout),
        gl.allocate_shared_memory(d_v.dtype, [STAGES, BLOCK_K, D], d_v.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_K], d_bias.layout),
        gl.allocate_shared_memory(gl.int32, [STAGES, 1, BLOCK_K], d_birth.layout),
        gl.allocate_shared_memory(gl.int32, [STAGES, 1, BLOCK_K], d_death.layout),
    )
    barriers = _Barriers(
        _make_barriers(2, 1), _make_barriers(2, 2),
        _make_barriers(STAGES, 1), _make_barriers(STAGES, 2), _make_barriers(STAGES, 1), _make_barriers(STAGES, 2),
    )  # fmt: skip
    fence_async_shared()
    sizes = _Sizes(items, tiles, kv_heads, mask_heads, segments, segment, snapshot, keys, length)
    inputs = _Inputs(d_q, d_k, d_v, d_bias, d_birth, d_death)
    gl.warp_specialize(
        [
            (_multiply_first, (shared, barriers, d_out, p_lse, p_count, sizes, scale, BLOCK_K, D, R, STAGES)),
            (_multiply_second, (shared, barriers, d_out, p_lse, p_count, sizes, scale, BLOCK_K, D, R, STAGES)),
            (_load, (inputs, shared, barriers, p_count, sizes, BLOCK_K, D, R, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )


def can_take(q: Tensor, group: int, segment_length: int, keys: int) -> bool:
    """Whether the kernel supports queries like `q`, with `group` heads per KV head and segments of these sizes."""
    return (
        q.is_cuda
        and torch.cuda.get_device_capability(q.device) == (9, 0)
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] in _STAGES
        and group in (1, 2, 4, 8, 16, 32, 64)
        and segment_length % BLOCK_K == 0
        and keys % BLOCK_K == 0
    )


def launch_hopper_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    birth: Tensor,
    death: Tensor,
    *,
    scale: float,
    segment_length: int,
) -> tuple[Tensor, Tensor]:
    """`launch_forward` for inputs that `can_take` accepts, with the same results.

    Two arguments differ: q must be aligned for tensor descriptors, and biases are in base 2, that is, times log2(e).
    """
    (batch, heads, length, head_dim), (z, kv_heads, keys) = q.shape, k.shape[:3]
    group = heads // kv_heads
    tiles = segment_length * group // 128
    count = launch_count_tiles(birth, death, segment_length=segment_length, positions=128 // group, block_k=BLOCK_K)
    out = torch.empty((batch, length, heads, head_dim), dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty((batch, heads, length), dtype=torch.float32, device=q.device)
    programs = min(torch.cuda.get_device_properties(q.device).multi_processor_count, tiles * z * kv_heads)
    _forward_kernel[(programs,)](
        _query_tiles(q, group), _slot_tiles(k), _slot_tiles(v), *(_slot_lines(x) for x in (bias, birth, death)),
        _query_tiles(out, group), lse, count,
        tiles * z * kv_heads, tiles, kv_heads, birth.shape[1], z // batch, segment_length, keys - segment_length, keys,
        length, scale, BLOCK_K=BLOCK_K, D=head_dim, R=group, STAGES=_STAGES[head_dim], num_warps=4,
    )  # fmt: skip
    return out, lse


def _query_tiles(x: Tensor, group: int) -> TensorDescriptor:
    """A descriptor of `[B, H, N, D]`, in tiles of 64 rows: 64 / R positions in all heads of a group."""
    return _described(x, [1, group, 64 // group, x.shape[-1]])


def _slot_tiles(x: Tensor) -> TensorDescriptor:
    """A descriptor of `[Z, G, K, D]`, as a matrix with a row for each slot, in tiles of slots."""
    return _described(x.view(-1, x.shape[-1]), [BLOCK_K, x.shape[-1]])


def _described(x: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, _layout(*block))


@functools.cache  # making one takes the CPU about half as long as a launch
def _layout(*block: int) -> gl.NVMMASharedLayout:
    """Layout of a tile in shared memory, for any element type of two bytes."""
    return gl.NVMMASharedLayout.get_default_for(list(block), gl.bfloat16)


def _slot_lines(x: Tensor) -> TensorDescriptor:
    """A descriptor of `[Z, G, K]`, as a matrix with rows of K slots, in tiles of slots."""
    lines = x.view(-1, x.shape[-1])
    return TensorDescriptor(lines, list(lines.shape), list(lines.stride()), [1, BLOCK_K], _LINES)
