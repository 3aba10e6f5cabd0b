"""The Triton kernel of decoding: in one launch, a new key enters the cache and its query attends.

The slots of a KV head are split among several programs, since one program per head would leave most of a GPU idle. Each
program reads the ranks of all slots, so all of them know which key the new one pushes out. Each attends to its own
slots. The program that finishes last adds up the parts and writes the new key, since then no program still reads the
old state.

B batch, G KV heads, R query heads of a KV head, D head dim, C slots, P programs of a KV head.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dma_kernels.decoding.state import CacheState, NewKeys
from dma_kernels.keep_rule import KeepRule
from dma_kernels.primitives import (
    LOG2_E,
    add_values,
    finite_shift,
    float32_precision,
    merge_parts,
    online_softmax_step,
    padded_head_dim,
    scaled_products,
)
from dma_kernels.rank_kernels import ordered_bits, saturated


class DecodeConfig(NamedTuple):
    """How the slots of a KV head are split.

    Attributes:
        tile: number of slots in a tile, a power of two from 16.
        share: number of slots of a program, a multiple of `tile`.
        warps: warps of a program, a power of two.
        stages: stages of the pipeline that loads tiles.
    """

    tile: int
    share: int
    warps: int
    stages: int


# Arguments whose values never make Triton compile the kernel again.
_SIZES = ("kv_heads", "group", "share", "parts", "window", "keep_last", "sinks")
_RANKS = 1024  # slots whose ranks are read at once
_PARTS = 8  # maximum number of parts that are added up at once
_ADDED = 2**15  # maximum number of numbers that are added up at once
_NOBODY = tl.constexpr(-2)  # a position that no key has
_FIRST, _LAST = tl.constexpr(-9223372036854775808), tl.constexpr(9223372036854775807)  # before and after all orders


@triton.jit
def _as_integer(rank):
    """`ranks.as_integers`, for int64 or float32."""
    return rank if rank.dtype == tl.int64 else ordered_bits(rank).to(tl.int64)


@triton.jit
def _load_bias(p_bias, o_c, m_c, query_bias, WIDE: tl.constexpr):
    """Biases of slots in float32; to float64 ones (`WIDE`), the query's bias is added before they are rounded."""
    b_bias = tl.load(p_bias + o_c, mask=m_c, other=0.0)
    return saturated(b_bias + query_bias).to(tl.float32) if WIDE else b_bias


@triton.jit
def _load_ranks(p_rank, p_position, p_ranked, o_c, slots, settled):
    """Ranks and positions in slots, and whether they compete: they do if they are ranked and not after `settled`."""
    m_c = o_c < slots
    b_rank, b_position = tl.load(p_rank + o_c, mask=m_c, other=0), tl.load(p_position + o_c, mask=m_c, other=0)
    return b_rank, b_position, (tl.load(p_ranked + o_c, mask=m_c, other=0) != 0) & (b_position <= settled)


@triton.jit
def _lowest(b_rank, b_position, m_competes, o_c, slots, EMPTY_FIRST: tl.constexpr):
    """Rank and position of the lowest key that competes, and its place in the tile.

    With `EMPTY_FIRST`, a slot whose key does not compete comes before all others.
    """
    b_other = tl.full(b_position.shape, _FIRST if EMPTY_FIRST else _LAST, tl.int64)
    if b_rank.dtype == tl.int64:
        b_order = tl.where(o_c < slots, tl.where(m_competes, b_rank, b_other), _LAST)
        rank = tl.min(b_order, axis=0)
        m_lowest = (b_order == rank) & (o_c < slots)
        if not EMPTY_FIRST:
            m_lowest = m_lowest & m_competes
        position, place = tl.min(tl.where(m_lowest, b_position, _LAST), axis=0, return_indices=True)
    else:  # both fit into one integer
        b_order = tl.where(m_competes, (ordered_bits(b_rank).to(tl.int64) << 32) + b_position, b_other)
        order, place = tl.min(tl.where(o_c < slots, b_order, _LAST), axis=0, return_indices=True)
        rank, position = order >> 32, order & 0xFFFFFFFF
    return rank, position, place


@triton.jit
def _load_flags(p_position, p_ranked, p_sink, o_c, m_c, SINKS: tl.constexpr):
    """Positions in slots, whether these are ranked, and whether they are sinks."""
    b_position = tl.load(p_position + o_c, mask=m_c, other=-1)
    m_ranked = tl.load(p_ranked + o_c, mask=m_c, other=0) != 0
    m_sink = tl.load(p_sink + o_c, mask=m_c, other=0) != 0 if SINKS else tl.zeros_like(m_ranked)
    return b_position, m_ranked, m_sink


@triton.jit
def _seen(b_position, m_ranked, m_sink, evicted):
    """Which slots the new query sees, from their flags."""
    return (m_ranked & (b_position != evicted)) | m_sink


@triton.jit
def _first_unseen(
    p_position, p_ranked, p_sink, slots, evicted,
    SINKS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """The first slot that the new query does not see."""
    b_free = tl.full([RANKS], 2147483647, tl.int32)
    for i in range(0, slots, RANKS):
        o_c = i + tl.arange(0, RANKS)
        m_c = o_c < slots
        b_position, m_ranked, m_sink = _load_flags(p_position, p_ranked, p_sink, o_c, m_c, SINKS)
        m_seen = _seen(b_position, m_ranked, m_sink, evicted)
        b_free = tl.minimum(b_free, tl.where(m_c & ~m_seen, o_c, 2147483647))
    return tl.min(b_free)


@triton.jit
def _unrank(p_position, p_ranked, slots, evicted, RANKS: tl.constexpr):
    """Mark the key of the position `evicted` as unranked."""
    for i in range(0, slots, RANKS):
        o_c = i + tl.arange(0, RANKS)
        m_c = o_c < slots
        b_position = tl.load(p_position + o_c, mask=m_c, other=-1)
        tl.store(p_ranked + o_c, 0, mask=m_c & (b_position == evicted))


@triton.jit
def _load_rows(p_x, o_c, m_c, D: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr):
    """Keys or values of a tile of slots, [BLOCK_C, BLOCK_D]; without a mask if all are real."""
    o_d = tl.arange(0, BLOCK_D)
    p_tile = p_x + o_c[:, None] * D + o_d[None, :]
    return tl.load(p_tile) if WHOLE else tl.load(p_tile, mask=m_c[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def _attend_tile(
    b_out, b_max, b_sum, b_q, b_key, b_value, b_bias, scale, BESIDES: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Add a tile of slots to the running softmax; biases are in base 2, and -inf where a slot is not seen."""
    b_logits = scaled_products(b_q, b_key, scale, PRECISION) + b_bias[None, :]
    b_logits = tl.where(b_bias[None, :] == -float("inf"), -float("inf"), b_logits)  # even if the key is NaN
    b_p, b_decay, b_max, b_sum = online_softmax_step(b_max, b_sum, b_logits)
    if BESIDES:  # a dead key may stay in its slot for long, and its NaN would pass through a weight of 0
        b_value = tl.where((b_bias != -float("inf"))[:, None], b_value, 0.0)
    return add_values(b_out, b_p, b_decay, b_value, PRECISION), b_max, b_sum


@triton.jit
def _add_parts(
    p_part, p_part_max, p_part_sum, parts, group, o_r,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The running softmax of all parts together; `.cg` loads from L2, past this multiprocessor's own cache."""
    o_d, m_r = tl.arange(0, BLOCK_D), o_r < group
    b_max, b_sum = tl.full([BLOCK_R], -float("inf"), tl.float32), tl.zeros([BLOCK_R], tl.float32)
    b_out = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for i in range(0, parts, PARTS):
        o_p = i + tl.arange(0, PARTS)
        o_pr, m_pr = o_p[:, None] * group + o_r[None, :], (o_p < parts)[:, None] & m_r[None, :]
        m_part = m_pr[:, :, None] & (o_d < D)[None, None, :]
        b_maxs = tl.load(p_part_max + o_pr, mask=m_pr, other=-float("inf"), cache_modifier=".cg")
        b_sums = tl.load(p_part_sum + o_pr, mask=m_pr, other=0.0, cache_modifier=".cg")
        p_tile = p_part + o_pr[:, :, None] * D + o_d[None, None, :]
        b_outs = tl.load(p_tile, mask=m_part, other=0.0, cache_modifier=".cg")
        b_out, b_max, b_sum = merge_parts(b_out, b_max, b_sum, b_outs, b_maxs, b_sums)
    return b_out, b_max, b_sum


@triton.jit
def _with_new_key(b_out, b_max, b_sum, b_q, b_k, b_v, new_bias, kept, scale):
    """The output, with the new key if it is kept."""
    b_logit = (tl.sum(b_q * b_k[None, :], axis=1) * scale + new_bias) * LOG2_E
    b_logit = tl.where(kept, b_logit, -float("inf"))
    b_shift = finite_shift(tl.maximum(b_max, b_logit))
    b_p, b_decay = tl.exp2(b_logit - b_shift), tl.exp2(b_max - b_shift)
    b_sum = b_sum * b_decay + b_p
    b_out = b_out * b_decay[:, None] + tl.where(kept, b_p[:, None] * b_v[None, :], 0.0)
    return b_out * (1.0 / tl.where(b_sum == 0.0, 1.0, b_sum))[:, None]


@triton.jit(do_not_specialize=_SIZES)
def _decode_step_kernel(
    p_q, p_k, p_v, p_new_bias, p_new_rank, p_query_bias, p_real,
    p_key, p_value, p_bias, p_rank, p_position, p_ranked, p_sink, p_length, p_seen,
    p_out, p_seen_bias, p_part, p_part_max, p_part_sum, p_arrivals,
    q_b, q_h, k_b, k_g, v_b, v_g, bias_b, bias_g, rank_b, rank_g, asked_b, asked_g,
    kv_heads, group, slots, share, parts, window, keep_last, sinks, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, FEW_R: tl.constexpr,
    BESIDES: tl.constexpr, SINKS: tl.constexpr, WHOLE: tl.constexpr, ONE_TILE: tl.constexpr, ALONE: tl.constexpr,
    RANKS: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One part of the attention of one KV head; the last program to arrive also writes the output and the new state."""
    i_part, i_g, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_row = i_b * kv_heads + i_g
    o_r, o_f, o_d, i_line = tl.arange(0, BLOCK_R), tl.arange(0, FEW_R), tl.arange(0, BLOCK_D), i_row * slots
    m_d, m_f = o_d < D, (o_f < group)[:, None] & (o_d < D)[None, :]
    p_rank, p_position, p_ranked, p_sink = p_rank + i_line, p_position + i_line, p_ranked + i_line, p_sink + i_line
    p_key, p_value, p_bias = p_key + i_line * D, p_value + i_line * D, p_bias + i_line
    first, end = i_part * share, tl.minimum(i_part * share + share, slots)

    # Everything that decides about the new key is loaded first; the first tile loads while ranks are compared.
    now, seen = tl.load(p_length + i_row), tl.load(p_seen + i_row)
    settled = now - keep_last  # keys up to this position compete
    o_c, o_s = first + tl.arange(0, BLOCK_C), tl.arange(0, RANKS)
    b_rank, b_at, m_competes = _load_ranks(p_rank, p_position, p_ranked, o_s, slots, settled)
    b_position, m_tile_ranked, m_sink = _load_flags(p_position, p_ranked, p_sink, o_c, o_c < end, SINKS)
    query_bias = 0.0 if p_query_bias is None else tl.load(p_query_bias + i_b * asked_b + i_g * asked_g).to(tl.float64)
    b_bias = _load_bias(p_bias, o_c, o_c < end, query_bias, WIDE)
    real = tl.full([], 1, tl.int1) if p_real is None else tl.load(p_real + i_b) != 0
    new_rank = tl.load(p_new_rank + i_b * rank_b + i_g * rank_g).to(p_rank.dtype.element_ty)
    kept_bias = tl.load(p_new_bias + i_b * bias_b + i_g * bias_g).to(p_bias.dtype.element_ty)
    kept_bias = kept_bias if WIDE else saturated(kept_bias)
    new_bias = saturated(kept_bias + query_bias).to(tl.float32) if WIDE else kept_bias
    p_q += i_b * q_b + i_g * group * q_h
    b_q = tl.load(p_q + tl.minimum(o_r, group - 1)[:, None] * q_h + o_d[None, :], mask=m_d[None, :], other=0.0)
    b_key = _load_rows(p_key, o_c, o_c < end, D, BLOCK_D, WHOLE)
    b_value = _load_rows(p_value, o_c, o_c < end, D, BLOCK_D, WHOLE)
    b_few_q = tl.load(p_q + o_f[:, None] * q_h + o_d[None, :], mask=m_f, other=0.0).to(tl.float32)
    b_k = tl.load(p_k + i_b * k_b + i_g * k_g + o_d, mask=m_d, other=0.0)
    b_v = tl.load(p_v + i_b * v_b + i_g * v_g + o_d, mask=m_d, other=0.0)

    lowest, lowest_at, place = _lowest(b_rank, b_at, m_competes, o_s, slots, not BESIDES)
    count = tl.sum(m_competes.to(tl.int32)) if BESIDES else 0
    for i in range(RANKS, slots, RANKS):
        o_s = i + tl.arange(0, RANKS)
        b_rank, b_at, m_competes = _load_ranks(p_rank, p_position, p_ranked, o_s, slots, settled)
        other, other_at, other_place = _lowest(b_rank, b_at, m_competes, o_s, slots, not BESIDES)
        is_lower = (other < lowest) | ((other == lowest) & (other_at < lowest_at))
        place = tl.where(is_lower, i + other_place, place)
        lowest, lowest_at = tl.where(is_lower, other, lowest), tl.where(is_lower, other_at, lowest_at)
        count += tl.sum(m_competes.to(tl.int32)) if BESIDES else 0
    # If keep_last is 0, the new key competes at once. At most one key has to leave.
    new_competes = real & (keep_last == 0)
    # Without last positions and sinks, all real keys of the document compete until there are w: no need to count them.
    over = count + new_competes.to(tl.int32) > window if BESIDES else real & (seen >= window)
    new_is_lowest = new_competes & (_as_integer(new_rank) < lowest)  # of two equal ranks the later wins
    wins = real & ~(over & new_is_lowest)
    is_sink = real & (seen < sinks)
    kept = wins | is_sink
    evicted = tl.where(over & ~new_is_lowest, lowest_at, _NOBODY)
    free = place  # if all keys compete, this is an empty slot or the slot of the lowest key
    if BESIDES:
        free = _first_unseen(p_position, p_ranked, p_sink, slots, evicted, SINKS, RANKS)
    if not ONE_TILE:  # prepare the biases of later tiles, with -inf where a slot is not seen
        p_seen_bias += i_line
        for i in range(first + BLOCK_C, end, RANKS):
            o_s = i + tl.arange(0, RANKS)
            b_at, m_at, m_first = _load_flags(p_position, p_ranked, p_sink, o_s, o_s < end, SINKS)
            b_seen_bias = _load_bias(p_bias, o_s, o_s < end, query_bias, WIDE) * LOG2_E
            b_seen_bias = tl.where(_seen(b_at, m_at, m_first, evicted), b_seen_bias, -float("inf"))
            tl.store(p_seen_bias + o_s, b_seen_bias, mask=o_s < end)
        tl.debug_barrier()

    b_max, b_sum = tl.full([BLOCK_R], -float("inf"), tl.float32), tl.zeros([BLOCK_R], tl.float32)
    b_out = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    b_bias = tl.where(_seen(b_position, m_tile_ranked, m_sink, evicted), b_bias * LOG2_E, -float("inf"))
    b_out, b_max, b_sum = _attend_tile(b_out, b_max, b_sum, b_q, b_key, b_value, b_bias, scale, BESIDES, PRECISION)
    if not ONE_TILE:
        for i in range(first + BLOCK_C, end, BLOCK_C):
            o_c = i + tl.arange(0, BLOCK_C)
            b_key = _load_rows(p_key, o_c, o_c < end, D, BLOCK_D, WHOLE)
            b_value = _load_rows(p_value, o_c, o_c < end, D, BLOCK_D, WHOLE)
            b_bias = tl.load(p_seen_bias + o_c, mask=o_c < end, other=-float("inf"))
            b_out, b_max, b_sum = _attend_tile(
                b_out, b_max, b_sum, b_q, b_key, b_value, b_bias, scale, BESIDES, PRECISION
            )

    arrived = 0
    if not ALONE:
        p_part += i_row * parts * group * D
        p_part_max, p_part_sum = p_part_max + i_row * parts * group, p_part_sum + i_row * parts * group
        o_pr, m_r = i_part * group + o_r, o_r < group
        tl.store(p_part + o_pr[:, None] * D + o_d[None, :], b_out, mask=m_r[:, None] & m_d[None, :])
        tl.store(p_part_max + o_pr, b_max, mask=m_r)
        tl.store(p_part_sum + o_pr, b_sum, mask=m_r)
        tl.debug_barrier()  # after this, all threads have stored their part and read the old state
        arrived = tl.atomic_add(p_arrivals + i_row, 1, sem="acq_rel")
    if arrived == parts - 1:
        p_out += i_row * group * D
        if ALONE:
            m_r = (o_r < group)[:, None] & m_d[None, :]
            b_out = _with_new_key(
                b_out, b_max, b_sum, b_q.to(tl.float32), b_k.to(tl.float32), b_v.to(tl.float32), new_bias, kept, scale
            )  # fmt: skip
            tl.store(p_out + o_r[:, None] * D + o_d[None, :], b_out.to(p_out.dtype.element_ty), mask=m_r)
            tl.debug_barrier()  # after this, all threads have read the old state
        else:
            b_few, b_few_max, b_few_sum = _add_parts(
                p_part, p_part_max, p_part_sum, parts, group, o_f, D, BLOCK_D, FEW_R, PARTS
            )  # fmt: skip
            b_few = _with_new_key(
                b_few, b_few_max, b_few_sum, b_few_q, b_k.to(tl.float32), b_v.to(tl.float32), new_bias, kept, scale
            )  # fmt: skip
            tl.store(p_out + o_f[:, None] * D + o_d[None, :], b_few.to(p_out.dtype.element_ty), mask=m_f)
            tl.store(p_arrivals + i_row, 0)
        if BESIDES:  # otherwise the new key takes the slot of the evicted one
            _unrank(p_position, p_ranked, slots, evicted, RANKS)
            tl.debug_barrier()  # the new key may take that slot here too
        tl.store(p_key + free * D + o_d, b_k, mask=m_d & kept)
        tl.store(p_value + free * D + o_d, b_v, mask=m_d & kept)
        tl.store(p_bias + free, kept_bias, mask=kept)
        tl.store(p_rank + free, new_rank, mask=kept)
        tl.store(p_position + free, now, mask=kept)
        tl.store(p_ranked + free, wins.to(tl.int8), mask=kept)
        tl.store(p_sink + free, is_sink.to(tl.int8), mask=kept)
        tl.store(p_length + i_row, now + 1)
        tl.store(p_seen + i_row, seen + tl.where(real, 1, 0))


def launch_decode_step(
    q: Tensor,
    new: NewKeys,
    state: CacheState,
    *,
    real: Tensor | None,
    keep: KeepRule,
    config: DecodeConfig | None = None,
) -> Tensor:
    """Output `[B, H, 1, D]`; the cache is changed in place. Arguments as in `decode_step_op`."""
    q, k, v, bias, ranks = (_addressable(x) for x in (q, new.key, new.value, new.key_bias, new.rank))
    asked = None if new.query_bias is None else _addressable(new.query_bias)
    (batch, kv_heads, slots, head_dim), group = state.key.shape, q.shape[1] // k.shape[1]
    tile, share, warps, stages = config or decode_config(state.key)
    parts, block_d = triton.cdiv(slots, share), padded_head_dim(head_dim)
    few = triton.next_power_of_2(group)
    rows = batch * kv_heads * parts
    part = torch.empty(rows * group * (head_dim + 2), dtype=torch.float32, device=q.device)
    part, part_max, part_sum = part.split([rows * group * head_dim, rows * group, rows * group])
    seen_bias = torch.empty(0 if share == tile else state.key_bias.numel(), dtype=torch.float32, device=q.device)
    out = torch.empty((batch, q.shape[1], 1, head_dim), dtype=q.dtype, device=q.device)
    _decode_step_kernel[parts, kv_heads, batch](
        q, k, v, bias, ranks, asked, real,
        *state.all[:5], state.ranked.view(torch.int8), state.sink.view(torch.int8), state.lengths, state.seen,
        out, seen_bias, part, part_max, part_sum, state.arrivals,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *bias.stride()[:2], *ranks.stride()[:2],
        *((0, 0) if asked is None else asked.stride()[:2]),
        kv_heads, group, slots, share, parts, keep.window, keep.last, keep.sinks, head_dim**-0.5,
        D=head_dim, BLOCK_D=block_d, BLOCK_R=max(16, triton.next_power_of_2(group)), BLOCK_C=tile,
        FEW_R=few, BESIDES=keep.last + keep.sinks > 0, SINKS=keep.sinks > 0,
        WHOLE=slots % tile == 0 and head_dim == block_d, ONE_TILE=share == tile, ALONE=parts == 1,
        RANKS=_RANKS, PARTS=max(1, min(_PARTS, _ADDED // (few * block_d))),
        PRECISION=float32_precision(), WIDE=state.key_bias.dtype == torch.float64, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def _addressable(x: Tensor) -> Tensor:
    """`x` [B, heads, 1, ...], or a copy if rows are not contiguous or heads are too far apart for 32-bit offsets."""
    near = (x.shape[1] - 1) * x.stride(1) < 2**31
    return x if near and (x.ndim < 4 or x.stride(-1) == 1) else x.clone(memory_format=torch.contiguous_format)


def decode_config(key: Tensor) -> DecodeConfig:
    """How to split a cache `[B, G, C, D]`: one tile per program, but no more programs than run at once.

    Measured on an NVIDIA H200 for head dim 128 and 2 bytes per element; for other sizes, tiles have as many bytes.
    """
    batch, kv_heads, slots, head_dim = key.shape
    cuda = key.device.type == "cuda"
    programs = 2 * torch.cuda.get_device_properties(key.device).multi_processor_count if cuda else 8
    fitting = 2**15 // (padded_head_dim(head_dim) * key.element_size())
    tile = max(16, min(128, fitting, triton.next_power_of_2(slots)))
    tiles = triton.cdiv(triton.cdiv(slots, tile), max(1, programs // (batch * kv_heads)))  # of a program
    return DecodeConfig(tile if tiles == 1 else max(16, tile // 2), tile * tiles, warps=4, stages=3)
