"""Ranks and biases of keys: ranks select keys, and biases are added to their logits.

B batch, G KV heads, N length, D head dim.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from dma_kernels.precision import without_autocast

ScoreForm = Literal["exp", "linear"]

# float32 has 23 mantissa bits. Only 16 are compared, because the last bits of a matrix product depend on its shape, and
# training, chunked prefill and decoding, whose shapes differ, must select the same keys.
DROPPED_MANTISSA_BITS = 7
CANONICAL_NAN = 0x7FC00000
SATURATION = 4  # biases are bounded by the largest number of their dtype, divided by this


def key_ranks(values: Tensor, A: Tensor, dt_weight: Tensor, dt_bias: Tensor | None = None) -> Tensor:
    """Rank of every key, `A · softplus(Δ v)`: the learned number that selection compares.

    Args:
        values: values of all KV heads, without rotation, `[B, G, N, D]`, any floating dtype.
        A: one factor per KV head, `[G]`.
        dt_weight: the map Δ from the values of all KV heads to one number per KV head, `[G, G * D]`.
        dt_bias: its bias, `[G]`; by default none.

    Returns:
        `[B, G, N]` in float32 (float64 if `values` are), even under autocast.

    Raises:
        ValueError: if the shapes do not match.

    Source: arXiv 2508.02124v6, equation 3, before the exponential.
    """
    if values.ndim != 4:
        raise ValueError(f"values: expected shape [B, G, N, D], got {list(values.shape)}")
    kv_heads, head_dim = values.shape[1], values.shape[3]
    if A.shape != (kv_heads,) or dt_weight.shape != (kv_heads, kv_heads * head_dim):
        raise ValueError(
            f"expected A [{kv_heads}] and dt_weight [{kv_heads}, {kv_heads * head_dim}] for values "
            f"{list(values.shape)}, got A {list(A.shape)} and dt_weight {list(dt_weight.shape)}"
        )
    if dt_bias is not None and dt_bias.shape != (kv_heads,):
        raise ValueError(f"dt_bias: expected [{kv_heads}], got {list(dt_bias.shape)}")
    dtype = torch.promote_types(values.dtype, torch.float32)
    with without_autocast(values.device):
        v_cat = values.transpose(1, 2).flatten(2).to(dtype)  # [B, N, G * D]
        u = F.linear(v_cat, dt_weight.to(dtype), None if dt_bias is None else dt_bias.to(dtype))
        # Contiguous, as the gradient is: otherwise torch assumes a wrong stride when it traces softplus' backward.
        u = u.transpose(1, 2).contiguous()  # [B, G, N]
        return A.to(dtype)[:, None] * F.softplus(u)


def rank_bias(ranks: Tensor, form: ScoreForm = "exp") -> Tensor:
    """Bias of every key, which is added to its logits: `exp(rank)`, or the rank itself for `"linear"`.

    Selection always compares ranks, so both forms select the same keys. In float32, `exp` overflows above a rank of
    88.7: the bias is then infinite, and every query that sees the key gets NaN, as does the loss.
    """
    if form not in get_args(ScoreForm):
        raise ValueError(f"score_form: expected one of {list(get_args(ScoreForm))}, got {form!r}")
    return ranks.exp() if form == "exp" else ranks


def saturated(key_bias: Tensor) -> Tensor:
    """Key biases as attention adds them to logits: limited in size to a quarter of their dtype's largest number.

    So neither the product with log2(e) nor the sum with q·k overflows. Keys beyond the bound have equal biases, which
    get no gradient. Infinities and NaN stay as they are, so that they show.
    """
    largest = torch.finfo(key_bias.dtype).max
    clamped = key_bias.clamp(-largest / SATURATION, largest / SATURATION)
    return torch.where(key_bias.abs() > largest, key_bias, clamped)


def as_integers(ranks: Tensor) -> Tensor:
    """The int64 integers by which ranks are compared, same shape: int64 ranks themselves, `ordered_bits` of others."""
    return ranks.detach() if ranks.dtype == torch.int64 else ordered_bits(ranks).long()


def ordered_bits(ranks: Tensor) -> Tensor:
    """Integers that compare as ranks do once these are rounded to 16 mantissa bits.

    Every NaN becomes the same positive NaN, which is the largest rank. So its key is selected, and the NaN shows in
    the loss. -0.0 equals +0.0.

    Args:
        ranks: any floating dtype, any shape; compared in float32.

    Returns:
        int32 of the same shape.
    """
    bits = ranks.detach().float().contiguous().view(torch.int32)
    half = (1 << (DROPPED_MANTISSA_BITS - 1)) - 1
    odd = (bits >> DROPPED_MANTISSA_BITS) & 1  # round half to even
    rounded = (bits + half + odd) & -(1 << DROPPED_MANTISSA_BITS)
    rounded = rounded.masked_fill(ranks.isnan(), CANONICAL_NAN)
    ordered = rounded ^ ((rounded >> 31) & 0x7FFFFFFF)  # among negative floats, a larger magnitude is a lower rank
    return ordered.masked_fill((rounded & 0x7FFFFFFF) == 0, 0)
