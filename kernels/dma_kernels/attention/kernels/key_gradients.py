"""The Triton kernel of the gradients of keys, values and key biases: deterministic, no atomics.

A program keeps a tile of keys and their gradients in registers. It loops over the tiles of queries that see any of
these keys, in all heads of the group. First come the tiles in which every query sees every key; they need no mask. On
request, the kernel also stores dS, keys by queries. From dS, one matrix product gives the gradient of the queries
(`query_gradients.py`).

B batch, H query heads, G KV heads, R = H / G group, N length, D head dim, S segment length, K slots, Z = B * segments.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from dma_kernels.attention.configs import KernelConfig, kernel_config
from dma_kernels.attention.kernels.common import SIZES, aligned, ds_tiles, query_tiles, slot_block, slot_tiles
from dma_kernels.attention.kernels.repeated import RepeatedKernel
from dma_kernels.primitives import LOG2_E, finite_shift, float32_precision, padded_head_dim, scaled_products
from dma_kernels.rank_kernels import LARGEST_BIAS


@triton.jit
def _add_query_tile(
    b_dk, b_dv, b_dbias, b_k, b_v, b_bias, b_birth, b_death, d_q, d_do, p_lse, p_delta, d_ds,
    i_b, i_h, i_start, i_tile, i_row, i_column, length, count, scale,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, MASKED: tl.constexpr, ROUNDED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what one tile of queries contributes to the gradients of the keys."""
    o_s = i_tile * BLOCK_S + tl.arange(0, BLOCK_S)
    m_s = o_s < count
    b_q = d_q.load([i_b, i_h, i_start + i_tile * BLOCK_S, 0]).reshape([BLOCK_S, BLOCK_D])
    b_do = d_do.load([i_b, i_h, i_start + i_tile * BLOCK_S, 0]).reshape([BLOCK_S, BLOCK_D])
    o_line = i_h * length + i_start + o_s
    b_lse = finite_shift(tl.load(p_lse + o_line, mask=m_s, other=0.0))
    b_delta = tl.load(p_delta + o_line, mask=m_s, other=0.0)

    b_logits = scaled_products(b_k, b_q, scale, PRECISION) + b_bias[:, None]
    b_p = tl.exp2(b_logits - b_lse[None, :])  # [BLOCK_K, BLOCK_S], rounded as in the forward
    if MASKED:
        visible = (b_birth[:, None] <= o_s[None, :]) & (o_s[None, :] < b_death[:, None]) & m_s[None, :]
        b_p = tl.where(visible, b_p, 0.0)
    b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
    b_ds = b_p * (tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION) - b_delta[None, :])
    if MASKED:
        b_ds = tl.where(visible, b_ds, 0.0)  # 0 times an infinity or NaN of a query that sees no key would be NaN
    b_rounded = b_ds.to(b_q.dtype)
    if d_ds is not None:
        d_ds.store([i_row, i_column + i_tile * BLOCK_S], b_rounded)
    if ROUNDED:
        b_ds = b_rounded.to(tl.float32)
    b_dk = tl.dot(b_rounded, b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv, b_dbias + tl.sum(b_ds, axis=1)


@triton.jit
def _store_margins(
    d_ds, i_row, first, end, group, segment, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, ALIGN: tl.constexpr
):
    """Store zeros before tile `first` and from `end` on, to multiples of ALIGN: dq reads larger tiles of queries."""
    b_zero = tl.zeros([BLOCK_K, BLOCK_S], dtype=d_ds.dtype)
    for i in range(group):
        for i_tile in range(first // ALIGN * ALIGN, first):
            d_ds.store([i_row, i * segment + i_tile * BLOCK_S], b_zero)
        for i_tile in range(end, tl.cdiv(end, ALIGN) * ALIGN):
            d_ds.store([i_row, i * segment + i_tile * BLOCK_S], b_zero)


@triton.jit(do_not_specialize=(*SIZES, "first_line"))
def _key_gradients_kernel(
    d_q, d_k, d_v, p_bias, p_birth, p_death, p_lse, p_delta, d_do, d_dk, d_dv, p_dbias, d_ds,
    kv_heads, mask_heads, group, length, segments, segment, keys, first_line, scale,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, ALIGN: tl.constexpr, ROUNDED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys."""
    key_tiles = keys // BLOCK_K
    i_zg, i_tile = tl.program_id(0) // key_tiles, tl.program_id(0) % key_tiles
    i_row = i_zg * keys + i_tile * BLOCK_K  # the row in dS, which begins with first_line
    i_zg += first_line
    i_z, i_g = i_zg // kv_heads, i_zg % kv_heads
    i_line = i_zg * keys + i_tile * BLOCK_K
    o_k = i_tile * BLOCK_K + tl.arange(0, BLOCK_K)
    o_mask = (i_z * mask_heads + i_g % mask_heads).to(tl.int64) * keys + o_k
    b_birth, b_death = tl.load(p_birth + o_mask), tl.load(p_death + o_mask)
    b_key_bias = tl.load(p_bias + i_zg.to(tl.int64) * keys + o_k).to(tl.float32)
    b_bias = b_key_bias * LOG2_E
    b_dk = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    b_dv = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    b_dbias = tl.zeros([BLOCK_K], dtype=tl.float32)
    i_b, i_start = i_z // segments, i_z % segments * segment
    count = tl.minimum(length - i_start, segment)
    p_lse += i_b.to(tl.int64) * kv_heads * group * length
    p_delta += i_b.to(tl.int64) * kv_heads * group * length

    # In `tiles` tiles from `first` on, queries see some of the keys. In `full` tiles from `begin` on, they see all.
    lives = b_death > b_birth
    first = tl.maximum(tl.min(tl.where(lives, b_birth, count)), 0) // BLOCK_S
    tiles = tl.maximum(tl.cdiv(tl.minimum(tl.max(tl.where(lives, b_death, 0)), count), BLOCK_S) - first, 0)
    begin = tl.cdiv(tl.maximum(tl.max(b_birth), 0), BLOCK_S)
    full = tl.maximum(tl.minimum(tl.min(b_death), count) // BLOCK_S - begin, 0)
    rest = tiles - full
    if tiles > 0:
        b_k, b_v = d_k.load([i_line, 0]), d_v.load([i_line, 0])  # [BLOCK_K, BLOCK_D]
        for i in range(group * full):
            b_dk, b_dv, b_dbias = _add_query_tile(
                b_dk, b_dv, b_dbias, b_k, b_v, b_bias, b_birth, b_death, d_q, d_do, p_lse, p_delta, d_ds,
                i_b, i_g * group + i // full, i_start, begin + i % full, i_row, i // full * segment,
                length, count, scale, BLOCK_D, BLOCK_S, False, ROUNDED, PRECISION,
            )  # fmt: skip
        for i in range(group * rest):
            i_rest = first + i % rest
            i_rest += tl.where((full > 0) & (i_rest >= begin), full, 0)
            b_dk, b_dv, b_dbias = _add_query_tile(
                b_dk, b_dv, b_dbias, b_k, b_v, b_bias, b_birth, b_death, d_q, d_do, p_lse, p_delta, d_ds,
                i_b, i_g * group + i // rest, i_start, i_rest, i_row, i // rest * segment,
                length, count, scale, BLOCK_D, BLOCK_S, True, ROUNDED, PRECISION,
            )  # fmt: skip
        if d_ds is not None:
            _store_margins(d_ds, i_row, first, first + tiles, group, segment, BLOCK_S, BLOCK_K, ALIGN)
    d_dk.store([i_line, 0], (b_dk * scale).to(d_dk.dtype))
    d_dv.store([i_line, 0], b_dv.to(d_dv.dtype))
    b_dbias = tl.where(tl.abs(b_key_bias) == LARGEST_BIAS, 0.0, b_dbias)  # saturated
    tl.store(p_dbias + i_zg.to(tl.int64) * keys + o_k, b_dbias)


class KeyGradients(NamedTuple):
    """The outputs of the kernel.

    Attributes:
        dk: `[Z, G, K, D]`.
        dv: same shape.
        dbias: float32 `[Z, G, K]`.
    """

    dk: Tensor
    dv: Tensor
    dbias: Tensor

    @classmethod
    def like(cls, k: Tensor, v: Tensor) -> "KeyGradients":
        """Empty tensors for the gradients of keys and values `[Z, G, K, D]`."""
        return cls(torch.empty_like(k), torch.empty_like(v), k.new_empty(k.shape[:3], dtype=torch.float32))


class StoredScores(NamedTuple):
    """The stored dS of consecutive lines. A line is segment z of KV head g, and has number z * G + g.

    Attributes:
        ds: `[lines * K, R * S]`, or more rows, in the dtype of q.
        first_line: number of the first line.
        lines: number of lines.
    """

    ds: Tensor
    first_line: int
    lines: int


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
    *,
    scale: float,
    segment_length: int | None = None,
    config: KernelConfig | None = None,
) -> KeyGradients:
    """Launch the kernel for `key_gradients`, without storing dS; in float32, bfloat16 or float16.

    `q` may also be `[B, H, N, D]`, with segments of S positions; by default, a sequence is one segment. `lse` is in
    base 2. `config` is by default the one from `kernel_config`.

    Raises:
        ValueError: for another dtype.
    """
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"expected q in float32, bfloat16 or float16, got {q.dtype}")
    missing = -q.shape[-1] % (16 // q.element_size())  # tensor descriptors step by 16 bytes
    if missing:
        q, k, v, grad_out = (F.pad(x, (0, missing)) for x in (q, k, v, grad_out))
    k, v, bias, birth, death, lse, delta = (x.contiguous() for x in (k, v, bias, birth, death, lse, delta))
    gradients = KeyGradients.like(k, v)
    if gradients.dbias.numel():
        launch = launcher_of_key_gradients(
            gradients, aligned(q), k, v, bias, birth, death, lse, delta, aligned(grad_out),
            scale=scale, segment_length=segment_length or q.shape[2], config=config,
        )  # fmt: skip
        launch(None)
    if missing:
        dk, dv = (x[..., :-missing].contiguous() for x in (gradients.dk, gradients.dv))
        return gradients._replace(dk=dk, dv=dv)
    return gradients


def key_tile(q: Tensor, keys: int) -> int:
    """The number of keys in a tile, for queries like `q` and segments of `keys` slots."""
    return slot_block(kernel_config("key gradients", q, padded_head_dim(q.shape[-1])).rows, keys)


def launcher_of_key_gradients(
    gradients: KeyGradients,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    birth: Tensor,
    death: Tensor,
    lse: Tensor,
    delta: Tensor,
    grad_out: Tensor,
    *,
    scale: float,
    segment_length: int,
    config: KernelConfig | None = None,
    read_block: int | None = None,
    rounded: bool = False,
) -> Callable[[StoredScores | None], None]:
    """A function that launches the kernel, which writes into `gradients`.

    Called with None, the function computes all lines and stores no dS. Called with `StoredScores`, it computes their
    lines, and stores dS for every tile of queries that sees a key of a tile.

    The other tensors are as in `launch_key_gradients`, but already have the layout that the kernel needs. If dS is
    stored, `read_block` is the number of queries in the tiles in which it will be read. Bias gradients are sums of dS:
    if `rounded`, after dS is rounded to the dtype of q, and otherwise before.
    """
    (batch, heads, length, head_dim), (z, kv_heads, keys) = q.shape, k.shape[:3]
    block_d = padded_head_dim(head_dim)
    block_k, block_s, warps, stages, registers = config or kernel_config("key gradients", q, block_d)
    block_k = slot_block(block_k, keys)
    if read_block is not None:
        block_s = slot_block(block_s, segment_length)
    tensors = (
        query_tiles(q, block_s, block_d), *(slot_tiles(x, block_k, block_d) for x in (k, v)), bias, birth, death,
        lse, delta, query_tiles(grad_out, block_s, block_d),
        *(slot_tiles(x, block_k, block_d) for x in (gradients.dk, gradients.dv)), gradients.dbias,
    )  # fmt: skip
    sizes = (kv_heads, birth.shape[1], heads // kv_heads, length, z // batch, segment_length, keys)
    constants = {"BLOCK_D": block_d, "BLOCK_S": block_s, "BLOCK_K": block_k}
    constants |= {"ALIGN": max(1, (read_block or 0) // block_s), "ROUNDED": rounded}
    constants |= {"PRECISION": float32_precision()}
    kernel = RepeatedKernel(_key_gradients_kernel, constants, num_warps=warps, num_stages=stages, maxnreg=registers)

    def launch(stored: StoredScores | None) -> None:
        d_ds, first_line, lines = None, 0, z * kv_heads
        if stored is not None:
            d_ds, first_line, lines = ds_tiles(stored.ds, block_k, block_s), stored.first_line, stored.lines
        kernel.launch(keys // block_k * lines, *tensors, d_ds, *sizes, first_line, scale)

    return launch
