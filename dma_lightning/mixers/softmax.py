"""Attention to the whole past, or to a sliding window of it.

B batch, N length, C hidden size, H query heads, G KV heads, D head dim.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from dma_kernels import Lifetimes, Packing
from dma_kernels.context import ContextGroup, exchange_window
from dma_kernels.decoding.attention import decode_attention
from dma_lightning.backends import ATTENTIONS, Backend, check_backend, explain_backend, resolve_backend
from dma_lightning.mixers.base import GroupedQueryMixer, mean_keys, merge_heads
from dma_lightning.mixers.drift import Drift, DriftConfig, Drifted, DriftingCache, add_up, add_up_parts
from dma_lightning.mixers.position_cache import Places, PositionCache
from dma_lightning.mixers.sdpa import PAIRS, ROWS, SDPA_OR_FLEX, attend_places, lifetime_attention


@dataclass(frozen=True, kw_only=True)
class SlidingWindowConfig(DriftConfig):
    """The settings that attention to a sliding window reads."""

    sliding_window: int = 64
    """swa: number of last positions that a query attends to, its own included."""


class MultiHeadAttention(GroupedQueryMixer[PositionCache | DriftingCache]):
    """Causal self-attention to the whole past, by PyTorch's `scaled_dot_product_attention`.

    With documents or padding, lifetimes give the mask, and on CUDA FlexAttention skips empty blocks.

    Args:
        backend: backend for windows shorter than the sequence and for biases; see `SlidingWindowAttention`.
        drift: drift of the biases, a decay with age; by default none.
        shape: the arguments of `GroupedQueryMixer`.

    Raises:
        ValueError: if the sizes do not match, or for an unknown backend.
    """

    window: int | None = None
    """How many positions a query sees, its own included; the whole past if None."""

    def __init__(self, *, backend: Backend = "auto", drift: Drift | None = None, **shape: Any) -> None:
        super().__init__(**shape)
        check_backend(backend)
        self.backend, self.drift = backend, drift

    @classmethod
    def from_config(cls, config: SlidingWindowConfig) -> Self:
        drift = Drift.from_config(config, config.sliding_window)
        return cls(**cls.shape_of(config), backend=config.backend, drift=drift)

    def place(self, layer: int, num_layers: int) -> None:
        if self.drift is not None:
            self.drift.place(layer, num_layers)

    def forward(
        self,
        x: Tensor,
        packing: Packing | None = None,
        cache: PositionCache | DriftingCache | None = None,
    ) -> Tensor:
        q, k, v = self.queries_keys_values(x, cache)  # [B, H, N, D] and [B, G, N, D]
        positions = cache.keys if isinstance(cache, DriftingCache) else cache
        drifted = None
        if self.drift is not None:
            drifted = self._drifted(self.drift(x, None if packing is None else packing.padding), cache)
        if positions is None and self.context is not None:
            return self.o_proj(merge_heads(self._attend_in_context(self.context, q, k, v, packing, drifted)))
        if positions is None or not positions.count:
            out = window_attention(q, k, v, self.window, self.backend, packing, drifted)
        if positions is None:
            return self.o_proj(merge_heads(out))
        fresh, biases = not positions.count, {} if drifted is None else {"bias": drifted.nats[..., None]}
        kept, keys, queries = positions.extend(packing, key=k, value=v, **biases)
        if not fresh and drifted is not None:
            out = drifting_attention(q, kept, queries, keys, self.window, drifted.query_bias)
        elif not fresh:
            out = attend_places(q, kept["key"], kept["value"], queries, keys, self.window)
        return self.o_proj(merge_heads(out))

    def _drifted(self, steps: Tensor, cache: PositionCache | DriftingCache | None) -> Drifted:
        if isinstance(cache, DriftingCache):
            return cache.advance(steps)
        return add_up(steps) if self.context is None else add_up_parts(steps, self.context)

    def _attend_in_context(
        self, context: ContextGroup, q: Tensor, k: Tensor, v: Tensor, packing: Packing | None, drifted: Drifted | None
    ) -> Tensor:
        """Attention of a part, `[B, H, n, D]`."""
        assert self.window is not None  # `join_context` refuses others
        bias = torch.zeros_like(k[..., 0], dtype=torch.promote_types(k.dtype, torch.float32))
        rows = k, v, bias if drifted is None else drifted.nats
        device, drifts = q.device, drifted is not None
        backend = resolve_backend(self.backend, device.type, device.index, q.dtype, self.head_dim, drifts)
        extended = exchange_window(context, rows, self.window, packing)
        return extended.attend(ATTENTIONS[backend], q, None if drifted is None else drifted.query_bias)

    def new_cache(self, batch: int, full: bool = False) -> PositionCache | DriftingCache:
        positions = PositionCache(batch, None if full else self.window, self.q_proj.weight.device)
        return positions if self.drift is None else DriftingCache.empty(positions, batch, self.drift)

    def mixing_flops(self, length: int) -> float:
        return 4 * self.num_heads * self.head_dim * mean_keys(length, self.window)

    def computed_by(self, device: torch.device, dtype: torch.dtype) -> str:
        if self.window is None and self.drift is None:
            return SDPA_OR_FLEX
        drifts = self.drift is not None
        return explain_backend(self.backend, device.type, device.index, dtype, self.head_dim, drifts)

    def cache_elements(self, length: int) -> int:
        kept = length if self.window is None else min(length, self.window)
        return kept * self.num_kv_heads * (2 * self.head_dim + (self.drift is not None))


class SlidingWindowAttention(MultiHeadAttention):
    """Causal self-attention to the last `sliding_window` positions, the query's own included.

    Args:
        sliding_window: w. Lifetimes give the mask, and the cache is a ring of w positions.
        backend: `triton`, `flex` or `torch`; `auto` as for `DynamicMaskAttention`. A window that holds the whole
            sequence is computed as `MultiHeadAttention`, whatever the backend.
        drift: drift of the biases, a decay with age; by default none.
        shape: the arguments of `GroupedQueryMixer`.

    Raises:
        ValueError: if the sizes do not match, or for an unknown backend.
    """

    def __init__(
        self, *, sliding_window: int, backend: Backend = "auto", drift: Drift | None = None, **shape: Any
    ) -> None:
        super().__init__(backend=backend, drift=drift, **shape)
        if sliding_window < 1:
            raise ValueError(f"sliding_window: expected at least 1, got {sliding_window}")
        self.window = sliding_window

    def join_context(self, context: ContextGroup | None) -> None:
        self.context = context

    @classmethod
    def from_config(cls, config: SlidingWindowConfig) -> Self:
        window = config.sliding_window
        shape, drift = cls.shape_of(config), Drift.from_config(config, window)
        return cls(**shape, sliding_window=window, backend=config.backend, drift=drift)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    backend: str,
    packing: Packing | None = None,
    drifted: Drifted | None = None,
) -> Tensor:
    """Attention of each query in a sequence to its last `window` positions, or to its whole past; differentiable.

    Args:
        q: `[B, H, N, D]`.
        k: `[B, G, N, D]`.
        v: `[B, G, N, D]`.
        window: number of positions that a query sees, its own included; None for all.
        backend: name of an attention backend, or `auto`.
        packing: documents and padding.
        drifted: how far the keys have drifted; by default there is no drift.

    Returns:
        `[B, H, N, D]`.
    """
    length, device = q.shape[2], q.device
    if (window is None or window >= length) and packing is None and drifted is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    mask = Lifetimes.sliding_window(length, window or length, device, packing=packing)
    if mask.capacity == length and drifted is None:
        return lifetime_attention(q, k, v, mask)
    backend = resolve_backend(backend, device.type, device.index, q.dtype, q.shape[-1], drifted is not None)
    if drifted is not None:
        return ATTENTIONS[backend](q, k, v, drifted.nats, mask, query_bias=drifted.query_bias)
    bias = torch.zeros(k.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32), device=device)
    return ATTENTIONS[backend](q, k, v, bias, mask)


def drifting_attention(
    q: Tensor, kept: dict[str, Tensor], queries: Places, keys: Places, window: int | None, query_bias: Tensor
) -> Tensor:
    """Attention of new positions to those of a cache, with a drift; computed for a few queries at a time.

    Args:
        q: `[B, H, n, D]`.
        kept: `key` and `value` `[B, G, M, D]`, and `bias` `[B, G, M, 1]`, the drift of the keys in float64.
        queries: places of the queries.
        keys: places of the keys.
        window: number of positions that a query sees; None for all.
        query_bias: minus the drift of the queries in float64, `[B, G, n]`; added to the keys' drift before rounding.

    Returns:
        `[B, H, n, D]`.
    """
    parts, rows = [], max(1, min(ROWS, PAIRS // kept["key"].shape[2]))
    for start in range(0, q.shape[2], rows):
        part, asked = (x[:, :, start : start + rows] for x in (q, query_bias))
        visible = queries.rows(start, start + rows).sees(keys, window).expand(-1, kept["key"].shape[1], -1, -1)
        parts.append(decode_attention(part, kept["key"], kept["value"], kept["bias"][..., 0], visible, asked))
    return torch.cat(parts, dim=2)
