"""Triton kernels of the terms of the retention loss.

The keys are cut into parts. If the target needs mean values, one kernel first sums the values that each query sees in
each part. Another kernel then passes over the keys of each part with two running softmaxes: of the logits and of the
prediction. After each of the two, a small kernel joins the parts.

Logits and log-sum-exps are in base 2, contents and drifts in nats. B batch, H query heads, G KV heads, N length, M
queries of a tile, K keys of a tile, P parts, D head dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dma_kernels.primitives import (
    LOG2_E,
    finite_shift,
    float32_precision,
    log_sum_exp,
    online_softmax_step,
    padded_head_dim,
    scaled_products,
)
from dma_kernels.retention.inputs import NO_QUERY, NO_RUN, TermInputs

_NO_RUN, _NO_QUERY = tl.constexpr(NO_RUN), tl.constexpr(NO_QUERY)
_PART = 256  # keys of a part
_JOINED = (64, 16)  # parts and queries that a program joins at once
_SUMMED = 32  # parts whose sums of values a program adds at once
_SUMS = tl.constexpr(7)  # numbers that each part stores for a query, in `_store_sums`
OPTIONS = {"num_warps": 4, "num_stages": 2}


@triton.jit
def load_queries(p_positions, p_runs, i_b, o_m, queries, runs_b):
    """Positions and documents of queries, [M]; -1 and a document without keys for those that do not exist."""
    m_m = o_m < queries
    b_position = tl.load(p_positions + o_m, mask=m_m, other=-1).to(tl.int32)
    b_run = tl.zeros_like(b_position)
    if p_runs is not None:
        b_run = tl.load(p_runs + i_b * runs_b + b_position, mask=m_m, other=_NO_RUN)
        b_run = tl.where(b_run == _NO_RUN, _NO_QUERY, b_run)
    return b_position, b_run


@triton.jit
def pairs(b_position, b_run, p_runs, i_b, o_n, length, runs_b, runs_far, distance):
    """Which pairs of a query and a key are seen, and which are far, [M, K]."""
    m_n = o_n < length
    b_age = b_position[:, None] - o_n[None, :]
    seen, far = m_n[None, :] & (b_age >= 0), m_n[None, :] & (b_age >= distance)
    if p_runs is not None:
        p_runs += i_b * runs_b + o_n
        seen &= tl.load(p_runs, mask=m_n, other=_NO_RUN)[None, :] == b_run[:, None]
        far &= tl.load(p_runs + runs_far, mask=m_n, other=_NO_RUN)[None, :] == b_run[:, None]
    return seen, far


@triton.jit
def load_drifts(p_drift, o_x, m_x, start):
    """Drifts at positions minus that at `start`, in nats; 0 without drifts. The pointer is to a row of them, or None.

    The decay of a key at a query is the difference of their drifts. A start close to both keeps it exact in float32.
    """
    b_drift = tl.zeros(o_x.shape, dtype=tl.float32)
    if p_drift is not None:
        b_drift = (tl.load(p_drift + o_x, mask=m_x, other=0.0) - tl.load(p_drift + start)).to(tl.float32)
    return b_drift


@triton.jit
def distances(b_v, b_high, b_low, b_norm, PRECISION: tl.constexpr):
    """Distances between values [K, D] and means [M, D] with squared norms `b_norm` [M], [M, K].

    A mean is the sum of two numbers of the values' dtype, so that the products are almost as exact as in float32.
    """
    b_product = tl.dot(b_high, tl.trans(b_v), input_precision=PRECISION)
    if b_v.dtype != tl.float32:
        b_product = tl.dot(b_low, tl.trans(b_v), b_product)
    b_wide = b_v.to(tl.float32)
    b_square = tl.sum(b_wide * b_wide, axis=1)[None, :] + b_norm[:, None] - 2 * b_product
    return tl.sqrt(tl.maximum(b_square, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def load_means(p_mean, i_bg, o_m, queries, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Both parts of the means of one KV head, [M, BLOCK_D], and squared norms, [M]."""
    p_mean += i_bg * queries * D
    b_high = load_rows(p_mean, o_m, o_m < queries, D, D, BLOCK_D)
    b_low = load_rows(p_mean + stride, o_m, o_m < queries, D, D, BLOCK_D)
    b_mean = b_high.to(tl.float32) + b_low.to(tl.float32)
    return b_high, b_low, tl.sum(b_mean * b_mean, axis=1)


@triton.jit
def load_rows(p_x, o_x, m_x, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Vectors of D numbers each, [rows, BLOCK_D]."""
    o_d = tl.arange(0, BLOCK_D)
    p_rows = p_x + o_x.to(tl.int64)[:, None] * stride + o_d[None, :]
    return tl.load(p_rows, mask=m_x[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def _sum_values_kernel(
    p_v, p_positions, p_runs, p_sum, p_seen, v_b, v_g, v_n, runs_b, runs_far, rows, kv_heads, queries, length,
    D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, K: tl.constexpr, PART: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The sum, and the number, of the values of one part that each query of a tile sees."""
    i_part, i_bg = tl.program_id(0), tl.program_id(2)
    i_b, i_g = (i_bg // kv_heads).to(tl.int64), (i_bg % kv_heads).to(tl.int64)
    o_m = tl.program_id(1) * M + tl.arange(0, M)
    b_position, b_run = load_queries(p_positions, p_runs, i_b, o_m, queries, runs_b)
    p_v += i_b * v_b + i_g * v_g
    b_sum, b_seen = tl.zeros([M, BLOCK_D], dtype=tl.float32), tl.zeros([M], dtype=tl.float32)
    end = tl.minimum(tl.minimum((i_part + 1) * PART, length), tl.max(b_position) + 1)
    for i in range(i_part * PART, end, K):
        o_n = i + tl.arange(0, K)
        b_v = load_rows(p_v, o_n, o_n < length, v_n, D, BLOCK_D)
        seen, _ = pairs(b_position, b_run, p_runs, i_b, o_n, length, runs_b, runs_far, 0)
        b_sum = tl.dot(seen.to(b_v.dtype), b_v, b_sum, input_precision=PRECISION)
        b_seen += tl.sum(seen.to(tl.float32), axis=1)
    o_row = (i_part.to(tl.int64) * rows + i_bg) * queries + o_m
    o_d = tl.arange(0, BLOCK_D)
    tl.store(p_seen + o_row, b_seen, mask=o_m < queries)
    m_sum = (o_m < queries)[:, None] & (o_d < D)[None, :]
    tl.store(p_sum + o_row[:, None] * D + o_d[None, :], b_sum, mask=m_sum)


@triton.jit
def _mean_values_kernel(
    p_sum, p_seen, p_mean, parts, rows, queries, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, P: tl.constexpr
):
    """The mean of the values that one query sees, from the sums of all parts; 0 if it sees none.

    The rounded mean is stored first, and then the remainder.
    """
    i_row = tl.program_id(1).to(tl.int64) * queries + tl.program_id(0)
    o_p, o_d = tl.arange(0, P), tl.arange(0, BLOCK_D)
    b_sum, b_seen = tl.zeros([BLOCK_D], dtype=tl.float32), tl.zeros([], dtype=tl.float32)
    for i in range(0, parts, P):
        m_p, o_row = i + o_p < parts, (i + o_p).to(tl.int64) * rows * queries + i_row
        m_sum = m_p[:, None] & (o_d < D)[None, :]
        b_sum += tl.sum(tl.load(p_sum + o_row[:, None] * D + o_d[None, :], mask=m_sum, other=0.0), axis=0)
        b_seen += tl.sum(tl.load(p_seen + o_row, mask=m_p, other=0.0), axis=0)
    b_mean = b_sum / tl.maximum(b_seen, 1.0)
    b_high = b_mean.to(p_mean.dtype.element_ty)
    p_mean += i_row * D + o_d
    tl.store(p_mean, b_high, mask=o_d < D)
    tl.store(p_mean + stride, (b_mean - b_high.to(tl.float32)).to(b_high.dtype), mask=o_d < D)


@triton.jit
def _store_sums(p_sums, o_row, m_m, stride, b_max, b_sum, b_effect, b_mass, b_hit, b_far_max, b_far_sum):
    """Store a part's numbers for each query: both running softmaxes, and sums relative to the first maximum."""
    tl.store(p_sums + o_row, b_max, mask=m_m)
    tl.store(p_sums + stride + o_row, b_sum, mask=m_m)
    tl.store(p_sums + 2 * stride + o_row, b_effect, mask=m_m)
    tl.store(p_sums + 3 * stride + o_row, b_mass, mask=m_m)
    tl.store(p_sums + 4 * stride + o_row, b_hit, mask=m_m)
    tl.store(p_sums + 5 * stride + o_row, b_far_max, mask=m_m)
    tl.store(p_sums + 6 * stride + o_row, b_far_sum, mask=m_m)


@triton.jit
def _sum_terms_kernel(
    p_q, p_k, p_v, p_content, p_drift, p_positions, p_runs, p_mean, p_sums,
    k_b, k_g, k_n, v_b, v_g, v_n, runs_b, runs_far, mean_half, distance, scale, stride, heads, kv_heads, queries,
    length, D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, K: tl.constexpr, PART: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The sums of one part, for a tile of queries of one head."""
    i_part, i_bh = tl.program_id(0), tl.program_id(2)
    i_b, i_g = (i_bh // heads).to(tl.int64), (i_bh % heads // (heads // kv_heads)).to(tl.int64)
    i_bg, o_m = i_b * kv_heads + i_g, tl.program_id(1) * M + tl.arange(0, M)
    m_m = o_m < queries
    b_position, b_run = load_queries(p_positions, p_runs, i_b, o_m, queries, runs_b)
    b_q = load_rows(p_q + i_bh.to(tl.int64) * queries * D, o_m, m_m, D, D, BLOCK_D)
    if p_mean is not None:
        b_high, b_low, b_norm = load_means(p_mean, i_bg, o_m, queries, mean_half, D, BLOCK_D)
        p_v += i_b * v_b + i_g * v_g
    p_k, p_content = p_k + i_b * k_b + i_g * k_g, p_content + i_bg * length
    if p_drift is not None:
        p_drift += i_bg * length
    b_now = load_drifts(p_drift, b_position, m_m, i_part * PART)

    b_max, b_far_max = tl.full([M], -float("inf"), tl.float32), tl.full([M], -float("inf"), tl.float32)
    b_sum, b_far_sum = tl.zeros([M], dtype=tl.float32), tl.zeros([M], dtype=tl.float32)
    b_effect, b_mass, b_hit = b_sum, b_sum, b_sum
    end = tl.minimum(tl.minimum((i_part + 1) * PART, length), tl.max(b_position) + 1)
    for i in range(i_part * PART, end, K):
        o_n = i + tl.arange(0, K)
        m_n = o_n < length
        seen, far = pairs(b_position, b_run, p_runs, i_b, o_n, length, runs_b, runs_far, distance)
        b_decay = load_drifts(p_drift, o_n, m_n, i_part * PART)[None, :] - b_now[:, None]
        b_foreseen = tl.load(p_content + o_n, mask=m_n, other=0.0)[None, :] + b_decay
        b_far_logits = tl.where(far, b_foreseen * LOG2_E, -float("inf"))
        _, _, b_far_max, b_far_sum = online_softmax_step(b_far_max, b_far_sum, b_far_logits)

        b_k = load_rows(p_k, o_n, m_n, k_n, D, BLOCK_D)
        b_logits = scaled_products(b_q, b_k, scale, PRECISION) + b_decay * LOG2_E
        b_p, b_old, b_max, b_sum = online_softmax_step(b_max, b_sum, tl.where(seen, b_logits, -float("inf")))
        if p_mean is not None:
            b_p *= distances(load_rows(p_v, o_n, m_n, v_n, D, BLOCK_D), b_high, b_low, b_norm, PRECISION)
        b_far = tl.where(far, b_p, 0.0)
        b_effect = b_effect * b_old + tl.sum(b_p, axis=1)
        b_mass = b_mass * b_old + tl.sum(b_far, axis=1)
        b_hit = b_hit * b_old + tl.sum(b_far * tl.where(far, b_foreseen, 0.0), axis=1)
    o_row = i_part.to(tl.int64) * _SUMS * stride + i_bh.to(tl.int64) * queries + o_m
    _store_sums(p_sums, o_row, m_m, stride, b_max, b_sum, b_effect, b_mass, b_hit, b_far_max, b_far_sum)


@triton.jit
def _load_sums(p_sums, i_part, o_row, rows, parts, stride, INDEX: tl.constexpr, OTHER: tl.constexpr):
    """One of the sums of several parts, [P, rows]; `OTHER` for parts that do not exist."""
    m_sums = (i_part < parts)[:, None] & (o_row < rows)[None, :]
    p_part = p_sums + (i_part.to(tl.int64)[:, None] * _SUMS + INDEX) * stride + o_row[None, :]
    return tl.load(p_part, mask=m_sums, other=OTHER)


@triton.jit
def _join_maxima(b_max, b_maxs):
    """The new maximum of a running softmax and of parts, and the factors that make their sums relative to it."""
    b_new = tl.maximum(b_max, tl.max(b_maxs, axis=0))
    b_shift = finite_shift(b_new)
    return b_new, tl.exp2(b_max - b_shift), tl.exp2(b_maxs - b_shift[None, :])


@triton.jit
def _join_terms_kernel(
    p_sums, p_fit, p_stats, parts, rows, stride, M: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """Fit and statistics of a tile of queries, from the sums of all parts."""
    o_row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    b_max, b_far_max = tl.full([M], -float("inf"), tl.float32), tl.full([M], -float("inf"), tl.float32)
    b_sum, b_far_sum = tl.zeros([M], dtype=tl.float32), tl.zeros([M], dtype=tl.float32)
    b_effect, b_mass, b_hit = b_sum, b_sum, b_sum
    for i in range(0, parts, P):
        i_part = i + tl.arange(0, P)
        b_maxs = _load_sums(p_sums, i_part, o_row, rows, parts, stride, 0, -float("inf"))
        b_max, b_old, b_weight = _join_maxima(b_max, b_maxs)
        b_sums = _load_sums(p_sums, i_part, o_row, rows, parts, stride, 1, 0.0)
        b_effects = _load_sums(p_sums, i_part, o_row, rows, parts, stride, 2, 0.0)
        b_masses = _load_sums(p_sums, i_part, o_row, rows, parts, stride, 3, 0.0)
        b_hits = _load_sums(p_sums, i_part, o_row, rows, parts, stride, 4, 0.0)
        b_sum = b_sum * b_old + tl.sum(b_sums * b_weight, axis=0)
        b_effect = b_effect * b_old + tl.sum(b_effects * b_weight, axis=0)
        b_mass = b_mass * b_old + tl.sum(b_masses * b_weight, axis=0)
        b_hit = b_hit * b_old + tl.sum(b_hits * b_weight, axis=0)
        b_maxs = _load_sums(p_sums, i_part, o_row, rows, parts, stride, 5, -float("inf"))
        b_far_max, b_old, b_weight = _join_maxima(b_far_max, b_maxs)
        b_sums = _load_sums(p_sums, i_part, o_row, rows, parts, stride, 6, 0.0)
        b_far_sum = b_far_sum * b_old + tl.sum(b_sums * b_weight, axis=0)

    b_total = tl.where(b_effect == 0.0, 1.0, b_effect)
    b_mass, b_hit = b_mass / b_total, b_hit / b_total
    b_far = log_sum_exp(b_far_max, b_far_sum)
    b_effect /= tl.where(b_sum == 0.0, 1.0, b_sum)  # of attention instead of its unnormalized weights
    m_row = o_row < rows
    tl.store(p_fit + o_row, b_hit - b_mass * finite_shift(b_far) / LOG2_E, mask=m_row)
    tl.store(p_stats + o_row, log_sum_exp(b_max, b_sum), mask=m_row)
    tl.store(p_stats + stride + o_row, b_effect, mask=m_row)
    tl.store(p_stats + 2 * stride + o_row, b_mass, mask=m_row)
    tl.store(p_stats + 3 * stride + o_row, b_far, mask=m_row)


def in_rows(inputs: TermInputs) -> TermInputs:
    """The same inputs, with vectors and rows of numbers contiguous in memory."""
    q, k, values, content, drift, positions, runs, distance = inputs
    k = k if k.stride(-1) == 1 else k.contiguous()
    values = values if values is None or values.stride(-1) == 1 else values.contiguous()
    drift, runs = None if drift is None else drift.contiguous(), None if runs is None else runs.contiguous()
    return TermInputs(q.contiguous(), k, values, content.contiguous(), drift, positions.contiguous(), runs, distance)


def strides(inputs: TermInputs) -> tuple[int, ...]:
    """Strides: of keys and of values; from one row of runs to the next; and between the two kinds of runs."""
    runs, values = inputs.runs, inputs.values
    of_values = (0, 0, 0) if values is None else values.stride()[:3]
    of_runs = (0, 0) if runs is None else (0 if runs.shape[1] == 1 else runs.shape[-1], runs[0].numel())
    return *inputs.k.stride()[:3], *of_values, *of_runs


def constants(inputs: TermInputs, *, gradient: bool = False) -> dict[str, int | str]:
    """Values that kernels are compiled for: M queries and K keys of a tile, and the head dim."""
    head_dim, block_d = inputs.q.shape[-1], padded_head_dim(inputs.q.shape[-1])
    small = inputs.q.element_size() > 2 or block_d > 128
    queries, keys = (32, 16) if small else (32, 64) if gradient else (64, 16)
    queries = min(queries, max(16, triton.next_power_of_2(inputs.q.shape[2])))
    return {"M": queries, "K": keys, "D": head_dim, "BLOCK_D": block_d, "PRECISION": float32_precision()}


def launch_head_terms(inputs: TermInputs) -> tuple[Tensor, Tensor, Tensor]:
    """`head_terms` by Triton kernels."""
    inputs, kept = in_rows(inputs), constants(inputs)
    (batch, heads, queries, head_dim), (kv_heads, length) = inputs.q.shape, inputs.k.shape[1:3]
    fit = inputs.q.new_empty(batch, heads, queries, dtype=torch.float32)
    stats, rows, parts = fit.new_empty(4, *fit.shape), fit.numel(), triton.cdiv(length, _PART)
    mean = inputs.k.new_empty((0,) if inputs.values is None else (2, batch, kv_heads, queries, head_dim))
    if not rows:
        return fit, stats, mean
    if inputs.values is not None:
        launch_mean_values(inputs, inputs.values, mean)
    sums = fit.new_empty(parts, _SUMS.value, rows)
    _sum_terms_kernel[parts, triton.cdiv(queries, kept["M"]), batch * heads](
        *inputs[:-1], None if inputs.values is None else mean, sums, *strides(inputs), mean.numel() // 2,
        inputs.distance, head_dim**-0.5, rows, heads, kv_heads, queries, length, **kept, PART=_PART, **OPTIONS,
    )  # fmt: skip
    joined, few = _JOINED
    _join_terms_kernel[(triton.cdiv(rows, few),)](sums, fit, stats, parts, rows, rows, M=few, P=joined)
    return fit, stats, mean


def launch_mean_values(inputs: TermInputs, values: Tensor, mean: Tensor) -> None:
    """Write the mean of the values that each query sees to `mean`, `[2, B, G, M, D]`."""
    (_, batch, kv_heads, queries, head_dim), length, kept = mean.shape, values.shape[2], constants(inputs)
    parts, rows = triton.cdiv(length, _PART), batch * kv_heads
    sums, seen = (mean.new_empty(parts, rows, queries, *x, dtype=torch.float32) for x in ((head_dim,), ()))
    _sum_values_kernel[parts, triton.cdiv(queries, kept["M"]), rows](
        values, inputs.positions, inputs.runs, sums, seen, *strides(inputs)[3:], rows, kv_heads, queries, length,
        **kept, PART=_PART, **OPTIONS,
    )  # fmt: skip
    _mean_values_kernel[queries, rows](
        sums, seen, mean, parts, rows, queries, mean.numel() // 2, D=head_dim, BLOCK_D=kept["BLOCK_D"], P=_SUMMED
    )
