"""How much attention falls on keys that a dynamic mask has dropped, compared with a window and with the best choice.

B batch, N length, H query heads, G KV heads, D head dim, Q sampled queries, w budget: the maximum number of keys that
a query keeps.
"""

from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from dma_kernels import Lifetimes, Packing
from dma_lightning.data.base import Batch
from dma_lightning.metrics import quotient
from dma_lightning.mixers import DynamicMaskAttention
from dma_lightning.model import DogeForCausalLM, decoder_of
from dma_lightning.monitoring.recording import FirstBatchMonitor, dynamic_layers, look_at_layers

_LEAST_GAIN = 1e-4  # of M_window - M_best; below it, efficiency would be a quotient of rounding errors


@dataclass(frozen=True)
class SampledQueries:
    """Queries that can see more than twice the budget, evenly spaced among all such queries of their row.

    Attributes:
        position: int64 `[B or 1, Q]`, ascending.
        real: bool, same shape; False in the places left over in a row with fewer than Q such queries.
    """

    position: Tensor
    real: Tensor

    @classmethod
    def of(cls, causal: Lifetimes, budget: int, count: int) -> "SampledQueries":
        """Sample queries of each row, in O(N).

        Without documents and padding they satisfy `2 * budget <= t < N`.

        Args:
            causal: the keys that a query could see, `[B or 1, 1, N]`.
            budget: w.
            count: Q.
        """
        itself = causal.death > causal.birth  # padding does not see itself
        late = (itself & (causal.live_counts() > 2 * budget))[:, 0]  # [B or 1, N]
        total, i = late.sum(-1, keepdim=True), torch.arange(count, device=late.device)
        number = torch.where(total > count, (2 * i + 1) * total // (2 * count), i)  # among the late ones
        position = torch.searchsorted(late.long().cumsum(-1), number + 1)
        return cls(position.clamp(max=causal.length - 1), i < total)


@dataclass(frozen=True)
class LostMass:
    """Share of each sampled query's attention to its whole past that falls on keys that it does not see.

    That attention is the softmax of the layer's own logits, key bias included, over every key that the query could see.

    Attributes:
        model: M, the share of the keys that the layer has dropped, `[B, H, Q]`.
        window: M_window, the share of the keys that a window of the last w real keys drops, `[B, H, Q]`.
        best: M_best, the share lost if each KV head and query keeps the w keys with the largest attention (mean over
            the heads of the group), `[B, H, Q]`: the least that w keys can lose, which no cache can reach.
        own_key: whether the query sees the key of its own position, bool `[B, G, Q]`.
        sampled: which entries belong to a sampled query, bool `[B, Q]`; the others are meaningless.
    """

    model: Tensor
    window: Tensor
    best: Tensor
    own_key: Tensor
    sampled: Tensor

    def sums(self) -> Tensor:
        """Sums over queries of the means over heads: M, M_window, M_best, own keys, and 1; floating `[5]`."""
        means = [x.to(self.model.dtype).mean(1) for x in (self.model, self.window, self.best, self.own_key)]
        rows = torch.stack([*means, torch.ones_like(means[0])])  # [5, B, Q]
        return rows.masked_fill(~self.sampled, 0).sum((1, 2))

    def head_efficiency(self) -> Tensor:
        """`efficiency` of each KV head, from the means over its queries, floating `[G]`."""
        shares = torch.stack([self.model, self.window, self.best]).masked_fill(~self.sampled[:, None], 0)
        groups = shares.sum((1, 3)).unflatten(1, (self.own_key.shape[1], -1))  # [3, G, H / G]
        return efficiency(*groups.mean(-1) / self.sampled.sum())


def efficiency(model: Tensor, window: Tensor, best: Tensor) -> Tensor:
    """`(M_window - M) / (M_window - M_best)`: 0 is as good as a window, 1 as good as the best keys.

    Below 0 is worse than a window. NaN where the denominator is below 1e-4, since nothing can be gained there.
    """
    gain = window - best
    return (window - model) / gain.masked_fill(gain < _LEAST_GAIN, torch.nan)


def lost_mass(
    q: Tensor,
    k: Tensor,
    key_bias: Tensor,
    lifetimes: Lifetimes,
    packing: Packing | None = None,
    queries: int = 64,
    near_bias: Tensor | None = None,
    distance: int = 0,
) -> LostMass:
    """What a mask loses, measured for sampled queries only, row by row: O(Q N) time, and memory for one row.

    Args:
        q: queries after norm and rotary embedding, floating `[B, H, N, D]`.
        k: keys, likewise, `[B, G, N, D]`.
        key_bias: what the layer adds to the logits of a key, `[B, G, N]`.
        lifetimes: the mask; its capacity is w.
        packing: documents and padding.
        queries: Q.
        near_bias: what the layer adds instead for a query less than `distance` positions after the key, `[B, G, N]`.
        distance: distance in positions from which on a key is no longer near.

    Returns:
        The shares, in float32 or in the dtype of q if that is wider. If no query can see more than 2 w keys, none is
        sampled.

    Source: for one layer and query, `o_all - o_kept = M (o_dropped - o_kept)`, where each o is the output of attention
    over only these keys. So M bounds the error of the output.
    """
    length, dtype = q.shape[2], torch.promote_types(q.dtype, torch.float32)
    causal = Lifetimes.causal(length, q.device, packing=packing)
    sample = SampledQueries.of(causal, lifetimes.capacity, queries)
    position, real = (x.expand(len(q), -1) for x in (sample.position, sample.real))
    key_bias, rows = key_bias.to(torch.promote_types(key_bias.dtype, dtype)), []
    with torch.autocast(q.device.type, enabled=False):
        for b, t in enumerate(position):
            bias = key_bias[b, :, None]  # [G, 1, N], or [G, Q, N] if near keys have another bias
            if near_bias is not None:
                is_near = t[:, None] - torch.arange(length, device=t.device) < distance
                bias = torch.where(is_near, near_bias[b, :, None], bias)
            bias = bias - key_bias[b].gather(-1, t.expand(len(key_bias[b]), -1))[..., None]  # small, then rounded
            attention = _attention(q[b, :, t].to(dtype), k[b].to(dtype), bias.to(dtype), _visible(causal, b, t))
            rows.append(_row(attention, _visible(causal, b, t), _visible(lifetimes, b, t), t, lifetimes.capacity))
    model, window, best, own_key = (torch.stack(x) for x in zip(*rows, strict=True))
    return LostMass(model, window, best, own_key, real)


def _visible(lifetimes: Lifetimes, row: int, position: Tensor) -> Tensor:
    """Which keys the queries at the given positions `[Q]` of a row see, bool `[G or 1, Q, N]`."""
    birth, death = (x[row if len(x) > 1 else 0, :, None] for x in (lifetimes.birth, lifetimes.death))
    return (birth <= position[:, None]) & (position[:, None] < death)


def _attention(q: Tensor, k: Tensor, key_bias: Tensor, allowed: Tensor) -> Tensor:
    """Attention of q `[H, Q, D]` to k `[G, N, D]` with bias `[G, 1 or Q, N]`: softmax over allowed keys `[1, Q, N]`.

    Returns:
        `[G, H / G, Q, N]`.
    """
    logits = q.unflatten(0, (len(k), -1)) @ k[:, None].mT / q.shape[-1] ** 0.5 + key_bias[:, None]
    return logits.masked_fill(~allowed, -torch.inf).softmax(-1)


def _row(attention: Tensor, allowed: Tensor, kept: Tensor, position: Tensor, budget: int) -> tuple[Tensor, ...]:
    """M, M_window and M_best `[H, Q]` of a row, and whether queries see their own keys `[G, Q]`."""
    newer = allowed.sum(-1, keepdim=True) - allowed.cumsum(-1)  # keys that came after each
    recent = allowed & (newer < budget)  # [1, Q, N]
    shared = attention.mean(1)  # [G, Q, N]
    top = shared.topk(min(budget, shared.shape[-1]), dim=-1, sorted=False).indices
    best = torch.zeros_like(shared, dtype=torch.bool).scatter_(-1, top, value=True)
    # Sum what is dropped: 1 - what is kept would be mostly rounding error where little is lost.
    lost = [attention.masked_fill(seen[:, None], 0).sum(-1).flatten(0, 1) for seen in (kept, recent, best)]
    own = kept.expand_as(shared).gather(-1, position[None, :, None].expand(len(shared), -1, 1))[..., 0]
    return (*lost, own)


class LostMassMonitor(FirstBatchMonitor):
    """Logs, at validations, how much attention falls on keys that dynamic masks have dropped, layer by layer.

    The figures come from one extra forward pass over the first sequences of the first validation batch of each process.
    Nothing is logged for other attentions, or for sequences no longer than twice the number of keys that a query keeps.

    Args:
        sequences: how many sequences of the batch to use.
        queries: how many queries of each sequence to sample, evenly spaced among those that can see more than twice the
            number of keys that they keep.

    Raises:
        ValueError: if a number is below 1.
    """

    def __init__(self, sequences: int = 4, queries: int = 64) -> None:
        super().__init__(sequences)
        if queries < 1:
            raise ValueError(f"queries: expected at least 1, got {queries}")
        self.queries = queries
        self.told = False  # whether the warning about short sequences was given

    def layers(self, model: DogeForCausalLM) -> dict[int, DynamicMaskAttention]:
        return dynamic_layers(model)

    def look(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch) -> None:
        model = decoder_of(pl_module)
        layers = self.layers(model)
        sums = look_at_layers(trainer, model, layers, batch, self._sums)
        total = trainer.strategy.reduce(torch.stack(list(sums.values())), reduce_op="sum")  # [layers, 5]
        figures = dict(zip(sums, map(_figures, total), strict=True))
        if not any(figures.values()):  # sums over all processes, so that none skips a call that others wait for
            self._tell_once(min(mixer.keep.capacity for mixer in layers.values()))
        for i, layer in figures.items():
            tags = {f"dma/layer_{i}/{name}": x for name, x in layer.items()}
            pl_module.log_dict(tags, sync_dist=True)  # all processes have the same figures; this avoids a warning

    def _sums(self, mixer: DynamicMaskAttention, x: Tensor, packing: Packing | None) -> Tensor:
        q, k, _ = mixer.queries_keys_values(x, None)
        lifetimes, key_bias = mixer.lifetimes(x, packing)
        near = mixer.near_bias(x, packing), mixer.near_distance or 0
        return lost_mass(q, k, key_bias, lifetimes, packing, self.queries, *near).sums()

    def _tell_once(self, budget: int) -> None:
        if not self.told:
            rank_zero_warn(
                f"LostMassMonitor: expected documents of more than {2 * budget} tokens, twice the {budget} keys that a "
                "query keeps, got none in the first validation batch; nothing is logged"
            )
        self.told = True


def _figures(sums: Tensor) -> dict[str, Tensor]:
    """Figures by name from `LostMass.sums` `[5]`; none without queries, no efficiency if nothing can be gained."""
    if not sums[-1]:
        return {}
    model, window, best, own_key = quotient(sums[:-1], sums[-1])
    figures = {"lost_mass": model, "lost_mass_window": window, "lost_mass_best": best, "own_key_late": own_key}
    if window - best < _LEAST_GAIN:
        return figures
    return figures | {"efficiency": efficiency(model, window, best)}
