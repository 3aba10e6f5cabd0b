"""The Triton kernel of the gradient of the queries: deterministic, no atomics.

A program keeps a tile of queries and their gradient in registers, and passes over the same slots as the forward:

    dq_t = scale · sum_j dS_tj k_j        dS = P (dO v - D), P = exp(logits - lse), D = rowsum(dO O)

D is needed for the gradients of the keys as well, so it is computed and written here. On request the gradient of a
bias of the queries comes with dq, sum_j dS_tj: 0 but for rounding, mostly that of O within D. The sums of dS by keys
hold the same rounding, so a number that is in both biases needs both, for it to cancel.

B batch, H query heads, G KV heads, N length, D head dim, S segment length, K slots, Z = B * segments.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dma_kernels.attention.configs import KernelConfig, kernel_config
from dma_kernels.attention.kernels.common import (
    SIZES,
    aligned,
    count_slot_tiles,
    locate_rows,
    slot_block,
    slot_of,
    slot_tiles,
    tile_logits,
)
from dma_kernels.primitives import finite_shift, float32_precision, padded_head_dim, row_pointers


@triton.jit
def _add_key_tile(
    b_dq, b_dbias, b_q, b_do, b_lse, b_delta, d_k, d_v, p_bias, p_birth, p_death, i_line, i_slot, o_t, scale,
    BLOCK_K: tl.constexpr, QUERY_BIAS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what one tile of keys contributes to the gradients of the queries, but for the scale, and of their biases."""
    b_k, b_v = d_k.load([i_line + i_slot, 0]), d_v.load([i_line + i_slot, 0])  # [BLOCK_K, BLOCK_D]
    b_logits = tile_logits(b_q, b_k, p_bias, p_birth, p_death, i_slot, o_t, scale, BLOCK_K, MASKED, PRECISION)
    b_p = tl.exp2(b_logits - b_lse[:, None])
    b_ds = b_p * (tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION) - b_delta[:, None])
    if MASKED:
        b_ds = tl.where(b_logits == -float("inf"), 0.0, b_ds)  # P = 0 does not stop an infinity or NaN
    if QUERY_BIAS:
        b_dbias += tl.sum(b_ds, axis=1)
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION), b_dbias


@triton.jit(do_not_specialize=SIZES)
def _query_gradients_kernel(
    p_q, d_k, d_v, p_bias, p_birth, p_death, p_lse, p_out, p_do, p_dq, p_delta, p_dbias,
    q_b, q_h, q_n, out_b, out_h, out_n, do_b, do_h, do_n, dq_b, dq_h, dq_n,
    kv_heads, mask_heads, group, length, segments, segment, snapshot, keys, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, QUERY_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of queries, and of their biases if there are any."""
    i_zg, i_z, i_g, i_b, i_tile, o_t, o_h, o_n, m_row = locate_rows(kv_heads, group, length, segments, segment, BLOCK_M)
    m_q = m_row[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    b_q = tl.load(row_pointers(p_q, i_b, o_h, o_n, q_b, q_h, q_n, BLOCK_D), mask=m_q, other=0.0)
    b_do = tl.load(row_pointers(p_do, i_b, o_h, o_n, do_b, do_h, do_n, BLOCK_D), mask=m_q, other=0.0)
    b_out = tl.load(row_pointers(p_out, i_b, o_h, o_n, out_b, out_h, out_n, BLOCK_D), mask=m_q, other=0.0)
    b_delta = tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), axis=1)
    o_row = (i_b * kv_heads * group + o_h) * length + o_n
    tl.store(p_delta + o_row, b_delta, mask=m_row)
    b_lse = finite_shift(tl.load(p_lse + o_row, mask=m_row, other=0.0))

    i_line = i_zg * keys
    p_bias += i_line.to(tl.int64)
    p_birth += (i_z * mask_heads + i_g % mask_heads).to(tl.int64) * keys
    p_death += (i_z * mask_heads + i_g % mask_heads).to(tl.int64) * keys
    full, own_full, partial, own_partial = count_slot_tiles(
        p_birth, p_death, snapshot, keys, i_tile, group, segment, BLOCK_M, BLOCK_K
    )
    b_dq, b_dbias = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32), tl.zeros([BLOCK_M], dtype=tl.float32)
    for i in range(full + own_full):
        i_slot = slot_of(i, full, 0, snapshot, BLOCK_K)
        b_dq, b_dbias = _add_key_tile(
            b_dq, b_dbias, b_q, b_do, b_lse, b_delta, d_k, d_v, p_bias, p_birth, p_death, i_line, i_slot, o_t, scale,
            BLOCK_K, QUERY_BIAS, False, PRECISION,
        )  # fmt: skip
    for i in range(partial + own_partial):
        i_slot = slot_of(i, partial, full * BLOCK_K, snapshot + own_full * BLOCK_K, BLOCK_K)
        b_dq, b_dbias = _add_key_tile(
            b_dq, b_dbias, b_q, b_do, b_lse, b_delta, d_k, d_v, p_bias, p_birth, p_death, i_line, i_slot, o_t, scale,
            BLOCK_K, QUERY_BIAS, True, PRECISION,
        )  # fmt: skip
    p_tile = row_pointers(p_dq, i_b, o_h, o_n, dq_b, dq_h, dq_n, BLOCK_D)
    tl.store(p_tile, (b_dq * scale).to(p_dq.dtype.element_ty), mask=m_q)
    if QUERY_BIAS:
        tl.store(p_dbias + o_row, b_dbias, mask=m_row)


def launch_query_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    birth: Tensor,
    death: Tensor,
    lse: Tensor,
    out: Tensor,
    grad_out: Tensor,
    *,
    scale: float,
    segment_length: int,
    dquery_bias: Tensor | None = None,
    config: KernelConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradient of q, `[B, H, N, D]` in its dtype, and rowsum(dO · O), float32 `[B, H, N]`.

    `out` and `lse` are the forward's, `grad_out` is the gradient of `out`; into `dquery_bias`, float32 `[B, H, N]`, go
    the sums of dS over the keys, if it is given; all else as in `launch_forward`.
    """
    (batch, heads, length, head_dim), (z, kv_heads, keys) = q.shape, k.shape[:3]
    q, out, grad_out = (aligned(x) for x in (q, out, grad_out))
    dq = torch.empty((batch, length, heads, head_dim), dtype=q.dtype, device=q.device).transpose(1, 2)
    delta, block_d = torch.empty_like(lse), padded_head_dim(head_dim)
    block_m, block_k, warps, stages, registers = config or kernel_config("query gradients", q, block_d)
    group, snapshot = heads // kv_heads, keys - segment_length
    block_k = slot_block(block_k, keys, snapshot)
    _query_gradients_kernel[(triton.cdiv(segment_length * group, block_m) * z * kv_heads,)](
        q, slot_tiles(k, block_k, block_d), slot_tiles(v, block_k, block_d), bias, birth, death, lse, out, grad_out,
        dq, delta, dquery_bias, *q.stride()[:3], *out.stride()[:3], *grad_out.stride()[:3], *dq.stride()[:3],
        kv_heads, birth.shape[1], group, length, z // batch, segment_length, snapshot, keys, scale,
        D=head_dim, BLOCK_D=block_d, BLOCK_M=block_m, BLOCK_K=block_k, QUERY_BIAS=dquery_bias is not None,
        PRECISION=float32_precision(), num_warps=warps, num_stages=stages, maxnreg=registers,
    )  # fmt: skip
    return dq, delta
