"""Mask and score mods from lifetimes, for any `flex_attention` call.

Each factory returns a new closure over tensors. `torch.compile` compares closures by their code, so a call with new
tensors of the same shapes reuses the compiled graph.

B batch, H query heads, G KV heads, K keys.
"""

from collections.abc import Callable

from torch import Tensor

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def lifetime_mask_mod(birth: Tensor, death: Tensor, num_heads: int | None = None) -> MaskMod:
    """A mask mod by which query t sees key j while `birth_j <= t < death_j`.

    Args:
        birth: int32 `[B or 1, G or 1, K]`.
        death: int32, same shape.
        num_heads: H, query heads, a multiple of G; needed if G is more than 1.

    Returns:
        A mask mod that takes the *query* head, as `flex_attention(..., enable_gqa=True)` gives it.

    Raises:
        ValueError: if the shapes or heads do not match.
    """
    if birth.shape != death.shape:
        raise ValueError(f"birth and death must have one shape, got {list(birth.shape)} and {list(death.shape)}")
    batch_and_head = _batch_and_head_of(death, num_heads)

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        # Not x[b][g][kv]: chained indexing of captured tensors crashes the compiled CPU path.
        row, head = batch_and_head(b, h)
        return (birth[row, head, kv] <= q) & (q < death[row, head, kv])

    return mask_mod


def key_bias_score_mod(bias: Tensor, num_heads: int | None = None, query_bias: Tensor | None = None) -> ScoreMod:
    """A score mod that adds each key's bias to its logits; differentiable in the bias.

    Args:
        bias: floating `[B or 1, G or 1, K]`.
        num_heads: H, query heads, a multiple of G; needed if G is more than 1.
        query_bias: added to all logits of a query, floating `[B or 1, G or 1, Q]` for Q queries. Softmax ignores it.
            But both biases are added in their own dtype before the sum is rounded to the dtype of the logits. So in
            float64, and with minus the drift of the queries, biases are as exact far into a text as at its beginning.

    Raises:
        ValueError: if the shape or heads do not match.
    """
    batch_and_head = _batch_and_head_of(bias, num_heads)
    if query_bias is not None:
        return _pair_bias_score_mod(bias, query_bias, num_heads)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        row, head = batch_and_head(b, h)
        return score + bias[row, head, kv]

    return score_mod


def _pair_bias_score_mod(bias: Tensor, query_bias: Tensor, num_heads: int | None) -> ScoreMod:
    """A score mod that adds the sum of a key's and a query's bias."""
    of_key, of_query = (_batch_and_head_of(x, num_heads) for x in (bias, query_bias))

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        (row, head), (query_row, query_head) = of_key(b, h), of_query(b, h)
        return score + (bias[row, head, kv] + query_bias[query_row, query_head, q]).to(score.dtype)

    return score_mod


def heads_per_row(kv_heads: int, num_heads: int | None) -> int:
    """How many query heads share one of `kv_heads` rows.

    Raises:
        ValueError: if `num_heads` is not a multiple of `kv_heads`, or is None although `kv_heads` is more than 1.
    """
    if num_heads is None and kv_heads > 1:
        raise ValueError(
            f"num_heads: expected the number of query heads, since the mask has {kv_heads} heads, got none; "
            f"give num_heads={kv_heads}, or a multiple of it for grouped queries"
        )
    num_heads = kv_heads if num_heads is None else num_heads
    if num_heads < 1 or num_heads % kv_heads:
        raise ValueError(f"num_heads: expected a multiple of the mask's {kv_heads} heads, got {num_heads}")
    return num_heads // kv_heads


def _batch_and_head_of(x: Tensor, num_heads: int | None) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A function that finds batch b and query head h in `x` [B or 1, G or 1, K]; checks shape and heads."""
    if x.ndim != 3:
        raise ValueError(f"expected [B or 1, G or 1, K], got {list(x.shape)}")
    batches, heads = int(x.shape[0] > 1), int(x.shape[1] > 1)
    group = heads_per_row(x.shape[1], num_heads)

    def batch_and_head(b: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return b * batches, h // group * heads

    return batch_and_head
