"""The Triton kernel behind `key_gradients.py`: deterministic, no atomics.

A program keeps a tile of keys and their gradients in registers and passes over the queries that see any of them, in
all heads of the group. Tiles of queries that all see all of these keys need no mask; they come first.

Z batch (of segments), H query heads, G KV heads, S queries, K keys, D head dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _add_query_tile(
    b_dk, b_dv, b_dbias, b_k, b_v, b_bias, b_birth, b_death, p_q, p_do, p_lse, p_delta,
    q_z, q_h, q_s, do_z, do_h, do_s, i_z, i_h, i_tile, heads, queries, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what one tile of queries contributes to the gradients of the keys."""
    r_s, o_d, i_s = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D), i_tile * BLOCK_S
    o_s, i_line = i_s + r_s, (i_z * heads + i_h) * queries + i_s
    p_q += i_z * q_z + i_h * q_h + i_s.to(tl.int64) * q_s  # 64 bits for the tile, 32 within it
    p_do += i_z * do_z + i_h * do_h + i_s.to(tl.int64) * do_s
    m_s = o_s < queries
    m_q = m_s[:, None] & (o_d < D)[None, :]
    b_q = tl.load(p_q + r_s[:, None] * q_s + o_d[None, :], mask=m_q, other=0.0)  # [BLOCK_S, BLOCK_D]
    b_do = tl.load(p_do + r_s[:, None] * do_s + o_d[None, :], mask=m_q, other=0.0)
    b_lse = tl.load(p_lse + i_line + r_s, mask=m_s, other=0.0) * _LOG2_E
    b_lse = tl.where(b_lse == -float("inf"), 0.0, b_lse)  # nobody to look at, or all at -inf: P is 0, not NaN
    b_delta = tl.load(p_delta + i_line + r_s, mask=m_s, other=0.0)

    b_logits = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * (scale * _LOG2_E)  # [BLOCK_K, BLOCK_S]
    b_p = tl.exp2(b_logits + (b_bias[:, None] - b_lse[None, :]))
    if MASKED:
        visible = (b_birth[:, None] <= o_s[None, :]) & (o_s[None, :] < b_death[:, None]) & m_s[None, :]
        b_p = tl.where(visible, b_p, 0.0)
    b_dv += tl.dot(b_p.to(b_do.dtype), b_do, input_precision=PRECISION)
    b_ds = b_p * (tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION) - b_delta[None, :])
    if MASKED:
        b_ds = tl.where(visible, b_ds, 0.0)  # P = 0 does not stop an infinity or NaN of a query that sees no key
    b_dk += tl.dot(b_ds.to(b_q.dtype), b_q, input_precision=PRECISION)
    return b_dk, b_dv, b_dbias + tl.sum(b_ds, axis=1)


@triton.jit
def _key_gradients_kernel(
    p_q, p_k, p_v, p_bias, p_birth, p_death, p_lse, p_delta, p_do, p_dk, p_dv, p_dbias,
    q_z, q_h, q_s, do_z, do_h, do_s, kv_heads, mask_heads, group, queries, keys, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys."""
    key_tiles = tl.cdiv(keys, BLOCK_K)
    i_zg = tl.program_id(0) // key_tiles
    i_z, i_g = (i_zg // kv_heads).to(tl.int64), (i_zg % kv_heads).to(tl.int64)
    o_k, o_d = tl.program_id(0) % key_tiles * BLOCK_K + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    m_k = o_k < keys
    m_kd = m_k[:, None] & (o_d < D)[None, :]
    i_row, i_mask = (i_z * kv_heads + i_g) * keys, (i_z * mask_heads + i_g % mask_heads) * keys
    o_kd = (i_row + o_k)[:, None] * D + o_d[None, :]
    b_birth = tl.load(p_birth + i_mask + o_k, mask=m_k, other=0)
    b_death = tl.load(p_death + i_mask + o_k, mask=m_k, other=0)
    b_bias = tl.load(p_bias + i_row + o_k, mask=m_k, other=0.0).to(tl.float32) * _LOG2_E
    b_k = tl.load(p_k + o_kd, mask=m_kd, other=0.0)  # [BLOCK_K, BLOCK_D]
    b_v = tl.load(p_v + o_kd, mask=m_kd, other=0.0)
    b_dk = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    b_dv = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    b_dbias = tl.zeros([BLOCK_K], dtype=tl.float32)

    # Tiles of queries: `tiles` from `first` on in which a key is seen, of these `full` from `begin` on see all keys.
    lives = b_death > b_birth
    first = tl.maximum(tl.min(tl.where(lives, b_birth, queries)), 0) // BLOCK_S
    tiles = tl.maximum(tl.cdiv(tl.minimum(tl.max(tl.where(lives, b_death, 0)), queries), BLOCK_S) - first, 0)
    begin = tl.cdiv(tl.maximum(tl.max(b_birth), 0), BLOCK_S)
    full = tl.maximum(tl.minimum(tl.min(b_death), queries) // BLOCK_S - begin, 0)
    rest = tiles - full

    for i in range(group * full):
        b_dk, b_dv, b_dbias = _add_query_tile(
            b_dk, b_dv, b_dbias, b_k, b_v, b_bias, b_birth, b_death, p_q, p_do, p_lse, p_delta,
            q_z, q_h, q_s, do_z, do_h, do_s, i_z, i_g * group + i // full, begin + i % full,
            kv_heads * group, queries, scale, D, BLOCK_D, BLOCK_S, False, PRECISION,
        )  # fmt: skip
    for i in range(group * rest):
        i_tile = first + i % rest
        i_tile += tl.where((full > 0) & (i_tile >= begin), full, 0)
        b_dk, b_dv, b_dbias = _add_query_tile(
            b_dk, b_dv, b_dbias, b_k, b_v, b_bias, b_birth, b_death, p_q, p_do, p_lse, p_delta,
            q_z, q_h, q_s, do_z, do_h, do_s, i_z, i_g * group + i // rest, i_tile,
            kv_heads * group, queries, scale, D, BLOCK_D, BLOCK_S, True, PRECISION,
        )  # fmt: skip
    tl.store(p_dk + o_kd, b_dk * scale, mask=m_kd)
    tl.store(p_dv + o_kd, b_dv, mask=m_kd)
    tl.store(p_dbias + i_row + o_k, b_dbias, mask=m_k)


def launch_key_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    birth: Tensor,
    death: Tensor,
    lse: Tensor,
    delta: Tensor,
    grad_out: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`key_gradients` for float32, bfloat16 and float16.

    Raises:
        ValueError: for another dtype.
    """
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"expected q in float32, bfloat16 or float16, got {q.dtype}")
    q, grad_out = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, grad_out))
    k, v, bias, birth, death, lse, delta = (x.contiguous() for x in (k, v, bias, birth, death, lse, delta))
    (batch, heads, queries, head_dim), (kv_heads, keys) = q.shape, k.shape[1:3]
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    dbias = torch.empty(k.shape[:3], dtype=torch.float32, device=k.device)
    if not dbias.numel():
        return dk, dv, dbias
    block_d = max(16, triton.next_power_of_2(head_dim))
    block_k, block_s, warps, stages = _config(q.dtype, block_d)
    # One axis: the others take no more than 65,535 programs.
    _key_gradients_kernel[(triton.cdiv(keys, block_k) * batch * kv_heads,)](
        q, k, v, bias, birth, death, lse, delta, grad_out, dk, dv, dbias, *q.stride()[:3], *grad_out.stride()[:3],
        kv_heads, birth.shape[1], heads // kv_heads, queries, keys, scale,
        D=head_dim, BLOCK_D=block_d, BLOCK_S=block_s, BLOCK_K=block_k,
        PRECISION=_float32_precision(), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return dk, dv, dbias


def _config(dtype: torch.dtype, block_d: int) -> tuple[int, int, int, int]:
    """Keys and queries of a tile, warps and pipeline stages; the fastest of a dozen on an H200."""
    if block_d > 128:
        return (16, 16, 4, 1) if dtype == torch.float32 else (32, 32, 4, 2)
    if dtype == torch.float32:
        return 32, 32, 4, 1
    return (64, 64, 4, 3) if block_d <= 64 else (64, 64, 4, 2)


def _float32_precision() -> str:
    """`ieee` or `tf32`, as torch's settings ask for; the rule of FlexAttention's own kernels."""
    setting = torch.backends.cuda.matmul.fp32_precision
    exact = torch.get_float32_matmul_precision() == "highest" if setting == "none" else setting == "ieee"
    return "ieee" if exact else "tf32"
