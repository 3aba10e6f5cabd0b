"""The Triton kernel for the gradient of the retention loss with respect to contents.

A program has a tile of keys of one KV head, and passes over all sampled queries of the group's heads. It recomputes
targets and predictions from their log-sum-exps. No two programs add to the same number, so the same inputs give the
same bits.

B batch, H query heads, G KV heads, N length, M queries of a tile, K keys of a tile, D head dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dma_kernels.primitives import LOG2_E, finite_shift, scaled_products
from dma_kernels.retention.inputs import TermInputs
from dma_kernels.retention.kernels import (
    OPTIONS,
    constants,
    distances,
    in_rows,
    load_drifts,
    load_means,
    load_queries,
    load_rows,
    pairs,
    strides,
)


@triton.jit
def _content_gradient_kernel(
    p_q, p_k, p_v, p_content, p_drift, p_positions, p_runs, p_grad, p_stats, p_mean, p_out,
    k_b, k_g, k_n, v_b, v_g, v_n, runs_b, runs_far, mean_half, distance, scale, stride, heads, kv_heads, queries,
    length, D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the contents of one tile of keys."""
    i_tile, i_bg = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_b, i_g, group = i_bg // kv_heads, i_bg % kv_heads, heads // kv_heads
    o_n = i_tile * K + tl.arange(0, K)
    m_n = o_n < length
    b_k = load_rows(p_k + i_b * k_b + i_g * k_g, o_n, m_n, k_n, D, BLOCK_D)
    if p_mean is not None:
        b_v = load_rows(p_v + i_b * v_b + i_g * v_g, o_n, m_n, v_n, D, BLOCK_D)
    if p_drift is not None:
        p_drift += i_bg * length
    b_then = load_drifts(p_drift, o_n, m_n, i_tile * K)
    b_content = tl.load(p_content + i_bg * length + o_n, mask=m_n, other=0.0)
    b_out = tl.zeros([K], dtype=tl.float32)
    for i in range(0, queries, M):
        o_m = i + tl.arange(0, M)
        m_m = o_m < queries
        b_position, b_run = load_queries(p_positions, p_runs, i_b, o_m, queries, runs_b)
        if tl.max(b_position) >= i_tile * K:
            _, far = pairs(b_position, b_run, p_runs, i_b, o_n, length, runs_b, runs_far, distance)
            b_decay = b_then[None, :] - load_drifts(p_drift, b_position, m_m, i_tile * K)[:, None]
            b_foreseen = (b_content[None, :] + b_decay) * LOG2_E
            b_distance = tl.full([M, K], 1.0, tl.float32)
            if p_mean is not None:
                b_high, b_low, b_norm = load_means(p_mean, i_bg, o_m, queries, mean_half, D, BLOCK_D)
                b_distance = distances(b_v, b_high, b_low, b_norm, PRECISION)
            for i_r in range(group):
                i_bh = i_b * heads + i_g * group + i_r
                o_row = i_bh * queries + o_m
                b_q = load_rows(p_q + i_bh * queries * D, o_m, m_m, D, D, BLOCK_D)
                b_lse = finite_shift(tl.load(p_stats + o_row, mask=m_m, other=0.0))
                b_total = tl.load(p_stats + stride + o_row, mask=m_m, other=1.0)
                b_mass = tl.load(p_stats + 2 * stride + o_row, mask=m_m, other=0.0)
                b_far_lse = finite_shift(tl.load(p_stats + 3 * stride + o_row, mask=m_m, other=0.0))
                b_logits = scaled_products(b_q, b_k, scale, PRECISION) + b_decay * LOG2_E
                b_target = tl.exp2(b_logits - b_lse[:, None]) * b_distance
                b_target /= tl.where(b_total == 0.0, 1.0, b_total)[:, None]
                b_fit = b_target - b_mass[:, None] * tl.exp2(b_foreseen - b_far_lse[:, None])
                b_grad = tl.load(p_grad + o_row, mask=m_m, other=0.0)
                b_out += tl.sum(tl.where(far, b_fit * b_grad[:, None], 0.0), axis=0)
    tl.store(p_out + i_bg * length + o_n, b_out, mask=m_n)


def launch_content_gradient(grad_fit: Tensor, inputs: TermInputs, stats: Tensor, mean: Tensor) -> Tensor:
    """`content_gradient` by a Triton kernel."""
    inputs, kept = in_rows(inputs), constants(inputs, gradient=True)
    (heads, queries, head_dim), (batch, kv_heads, length) = inputs.q.shape[1:], inputs.content.shape
    out = torch.empty_like(inputs.content, dtype=torch.float32)
    if not queries:
        return out.zero_()
    _content_gradient_kernel[triton.cdiv(length, kept["K"]), batch * kv_heads](
        *inputs[:-1], grad_fit.contiguous(), stats, None if inputs.values is None else mean, out, *strides(inputs),
        mean.numel() // 2, inputs.distance, head_dim**-0.5, grad_fit.numel(), heads, kv_heads, queries, length,
        **kept, **OPTIONS,
    )  # fmt: skip
    return out
