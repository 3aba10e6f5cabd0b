"""The Triton kernel of the forward pass.

A program keeps a tile of queries in registers and loops over tiles of slots of its segment. First come the tiles at the
beginning of the snapshot and of the own keys that all of its queries see; they need no mask. Then come the rest of the
visible snapshot prefix and the own keys born so far, with a mask.

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
from dma_kernels.primitives import (
    add_values,
    float32_precision,
    log_sum_exp,
    normalized,
    online_softmax_step,
    padded_head_dim,
    row_pointers,
)


@triton.jit
def _attend_tile(
    b_out, b_max, b_sum, b_q, d_k, d_v, p_bias, p_birth, p_death, i_line, i_slot, o_t, scale,
    BLOCK_K: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to the running softmax."""
    b_k = d_k.load([i_line + i_slot, 0])  # [BLOCK_K, BLOCK_D]
    b_logits = tile_logits(b_q, b_k, p_bias, p_birth, p_death, i_slot, o_t, scale, BLOCK_K, MASKED, PRECISION)
    b_p, b_decay, b_max, b_sum = online_softmax_step(b_max, b_sum, b_logits)
    b_v = d_v.load([i_line + i_slot, 0])
    return add_values(b_out, b_p, b_decay, b_v, PRECISION), b_max, b_sum


@triton.jit(do_not_specialize=SIZES)
def _forward_kernel(
    p_q, d_k, d_v, p_bias, p_birth, p_death, p_out, p_lse,
    q_b, q_h, q_n, out_b, out_h, out_n, kv_heads, mask_heads, group, length, segments, segment, snapshot, keys, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of one tile of queries."""
    i_zg, i_z, i_g, i_b, i_tile, o_t, o_h, o_n, m_row = locate_rows(kv_heads, group, length, segments, segment, BLOCK_M)
    m_q = m_row[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    b_q = tl.load(row_pointers(p_q, i_b, o_h, o_n, q_b, q_h, q_n, BLOCK_D), mask=m_q, other=0.0)
    i_line = i_zg * keys
    p_bias += i_line.to(tl.int64)
    p_birth += (i_z * mask_heads + i_g % mask_heads).to(tl.int64) * keys
    p_death += (i_z * mask_heads + i_g % mask_heads).to(tl.int64) * keys
    full, own_full, partial, own_partial = count_slot_tiles(
        p_birth, p_death, snapshot, keys, i_tile, group, segment, BLOCK_M, BLOCK_K
    )

    b_out = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_max, b_sum = tl.full([BLOCK_M], -float("inf"), tl.float32), tl.zeros([BLOCK_M], dtype=tl.float32)
    for i in range(full + own_full):
        i_slot = slot_of(i, full, 0, snapshot, BLOCK_K)
        b_out, b_max, b_sum = _attend_tile(
            b_out, b_max, b_sum, b_q, d_k, d_v, p_bias, p_birth, p_death, i_line, i_slot, o_t, scale,
            BLOCK_K, False, PRECISION,
        )  # fmt: skip
    for i in range(partial + own_partial):
        i_slot = slot_of(i, partial, full * BLOCK_K, snapshot + own_full * BLOCK_K, BLOCK_K)
        b_out, b_max, b_sum = _attend_tile(
            b_out, b_max, b_sum, b_q, d_k, d_v, p_bias, p_birth, p_death, i_line, i_slot, o_t, scale,
            BLOCK_K, True, PRECISION,
        )  # fmt: skip
    b_lse, b_out = log_sum_exp(b_max, b_sum), normalized(b_out, b_sum)
    p_tile = row_pointers(p_out, i_b, o_h, o_n, out_b, out_h, out_n, BLOCK_D)
    tl.store(p_tile, b_out.to(p_out.dtype.element_ty), mask=m_q)
    tl.store(p_lse + (i_b * kv_heads * group + o_h) * length + o_n, b_lse, mask=m_row)


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    birth: Tensor,
    death: Tensor,
    *,
    scale: float,
    segment_length: int,
    config: KernelConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Output `[B, H, N, D]` and log-sum-exp in base 2, `[B, H, N]` in float32, for float32, bfloat16 and float16.

    Args:
        q: `[B, H, N, D]`.
        k: in segment order, contiguous, `[Z, G, K, D]`; K - S (the snapshot slots) and K are multiples of 16.
        v: `[Z, G, K, D]`.
        bias: float32 `[Z, G, K]`.
        birth: first query of the segment that sees a slot, int32 `[Z, G or 1, K]`; own slots in order of birth.
        death: first later query that no longer sees it, same shape; snapshot slots in descending order.
        scale: factor of q·k.
        segment_length: S.
        config: by default the one from `kernel_config`.
    """
    (batch, heads, length, head_dim), (z, kv_heads, keys) = q.shape, k.shape[:3]
    q, block_d = aligned(q), padded_head_dim(head_dim)
    out = torch.empty((batch, length, heads, head_dim), dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty((batch, heads, length), dtype=torch.float32, device=q.device)
    block_m, block_k, warps, stages, registers = config or kernel_config("forward", q, block_d)
    group, snapshot = heads // kv_heads, keys - segment_length
    block_k = slot_block(block_k, keys, snapshot)
    _forward_kernel[(triton.cdiv(segment_length * group, block_m) * z * kv_heads,)](
        q, slot_tiles(k, block_k, block_d), slot_tiles(v, block_k, block_d), bias, birth, death, out, lse,
        *q.stride()[:3], *out.stride()[:3],
        kv_heads, birth.shape[1], group, length, z // batch, segment_length, snapshot, keys, scale,
        D=head_dim, BLOCK_D=block_d, BLOCK_M=block_m, BLOCK_K=block_k,
        PRECISION=float32_precision(), num_warps=warps, num_stages=stages, maxnreg=registers,
    )  # fmt: skip
    return out, lse
