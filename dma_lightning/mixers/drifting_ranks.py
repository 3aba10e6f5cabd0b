"""Ranks and biases of keys whose heads drift, beside heads that rank as published.

A head with a drift is a window whose edge its content can move; one without is a memory. A layer may have both.

B batch, N length, C hidden size, G KV heads.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dma_kernels import Packing
from dma_kernels.fixed_point import drifted_ranks
from dma_kernels.precision import without_autocast
from dma_kernels.ranks import as_integers
from dma_lightning.mixers.drift import Drift, DriftConfig, Drifted, DriftingCache, add_up

Content = Literal["values", "input"]
ContentInBias = bool | Literal["far"]

_OPTIONS = ("content", "content_in_bias", "memory_heads", "memory_every", "memory_stripes")
_STRIPE = 4.0  # nats by which a key of a head's own stripe outranks others, until contents learn better
_LARGEST_CONTENT = 8.0  # of the layer's input, in nats


@dataclass(frozen=True, kw_only=True)
class DriftingRanksConfig(DriftConfig):
    """What ranks with a drift take of a model's configuration."""

    content: Content = "values"
    """dma with a drift: what ranks come from besides the drift: the values at a position, as published, or the layer's
    input by a linear map that is 0 at the start."""
    content_in_bias: ContentInBias = True
    """dma with a drift: whether that content is added to the logits, too (true), to those of keys that are no longer
    among the last `keep_last` positions (far; to train alone, since caches do not know it), or ranks keys alone
    (false)."""
    memory_heads: float = 0.0
    """dma with a drift: KV heads of a layer that have none, and rank and add biases as published; below 1, their
    share."""
    memory_every: int = 1
    """dma with a drift: every so many layers have memory heads, from the first on."""
    memory_stripes: int = 0
    """dma with memory heads: such a head prefers every so many-th position, and the next one the positions after these,
    so that heads remember different keys and together all; 0: they have no preference."""


class DriftedKeys(NamedTuple):
    """What a layer makes of its keys, `[B, G, N]` each; with a drift, ranks are int64, and biases float64."""

    rank: Tensor
    key_bias: Tensor
    drifted: Drifted | None = None  # if heads drift
    near_bias: Tensor | None = None  # bias of keys among the last positions, if theirs is another one


class DriftingRanks(nn.Module):
    """Adds a drift to the ranks of a layer.

    Args:
        drift: of all KV heads.
        hidden_size: C.
        content: `values` or `input`.
        content_in_bias: whether the content is part of the bias; `far`: of keys that are not among the last positions.
        memory_heads: how many KV heads, or which share of them below 1, have no drift.
        memory_every: every so many layers have such heads.
        memory_stripes: S. Memory head m, counted over all layers, ranks the keys at positions j with j mod S = m mod S
            above others. With 0 all positions are alike.

    Raises:
        ValueError: for an unknown content, more memory heads than there are, or stripes without such heads.
    """

    def __init__(
        self,
        drift: Drift,
        hidden_size: int,
        content: Content = "values",
        content_in_bias: ContentInBias = True,
        memory_heads: float = 0.0,
        memory_every: int = 1,
        memory_stripes: int = 0,
    ) -> None:
        super().__init__()
        if content not in get_args(Content):
            raise ValueError(f"content: expected one of {list(get_args(Content))}, got {content!r}")
        heads = drift.num_kv_heads
        count = memory_heads * heads if memory_heads < 1 else memory_heads
        if not 0 <= count <= heads or count != int(count):
            raise ValueError(
                f"memory_heads: expected from 0 to {heads} KV heads, or a share that is a whole number of them, got "
                f"{memory_heads}"
            )
        if not isinstance(content_in_bias, bool) and content_in_bias != "far":
            raise ValueError(f"content_in_bias: expected true, false or far, got {content_in_bias!r}")
        if memory_every < 1:
            raise ValueError(f"memory_every: expected at least 1, got {memory_every}")
        if memory_stripes < 0 or (memory_stripes and not count):
            raise ValueError(
                f"memory_stripes: expected 0, or a number of stripes and memory heads that share them, got "
                f"{memory_stripes} with memory_heads {memory_heads}"
            )
        self.drift, self.content_in_bias = drift, content_in_bias
        self.memory_heads, self.memory_every, self.stripes = int(count), memory_every, memory_stripes
        self.register_buffer("stripe", torch.zeros(heads, dtype=torch.int64), persistent=False)
        self.stripe: Tensor  # of each head
        self.weight = nn.Parameter(torch.zeros(heads, hidden_size)) if content == "input" else None
        self.place(0, 1)

    @classmethod
    def from_config(cls, config: DriftingRanksConfig, window: int) -> Self | None:
        """Those of a configuration, counted by a window; None if it has no drift.

        Raises:
            ValueError: if it has none, but asks for what only a drift can have.
        """
        drift = Drift.from_config(config, window)
        options = {name: getattr(config, name) for name in _OPTIONS}
        if drift is not None:
            return cls(drift, config.hidden_size, **options)
        defaults = DriftingRanksConfig()
        if changed := {name: value for name, value in options.items() if value != getattr(defaults, name)}:
            raise ValueError(
                f"drift: expected constant or gate with {changed}, got none; name a drift, or leave these out"
            )
        return None

    def place(self, layer: int, num_layers: int) -> None:
        """Set which heads have a drift, and how much at the start, as it is for a layer."""
        self.drift.place(layer, num_layers, 0 if layer % self.memory_every else self.memory_heads)
        if self.stripes:
            first = layer // self.memory_every * self.memory_heads
            self.stripe.copy_((first + torch.arange(len(self.stripe))) % self.stripes)

    @property
    def has_memories(self) -> bool:
        """Whether some layers have heads without a drift."""
        return self.memory_heads > 0

    def forward(
        self,
        x: Tensor,
        rank: Tensor,
        key_bias: Tensor,
        packing: Packing | None = None,
        cache: DriftingCache | None = None,
    ) -> DriftedKeys:
        """Ranks and biases with the drift.

        Args:
            x: the layer's input `[B, N, C]`.
            rank: as published, `[B, G, N]`.
            key_bias: likewise.
            packing: documents, which change nothing, and padding, which does not drift.
            cache: what has been read before; it is advanced.
        """
        steps = self.drift(x, None if packing is None else packing.padding)
        content = self.content(x, rank)
        if self.stripes:
            rank = rank + _STRIPE * self._on_stripe(x, cache)
        drifted = add_up(steps) if cache is None else cache.advance(steps)
        # Times 0, not left out, so that DDP gets the gradients that it waits for, and a NaN shows in the loss.
        bias = drifted.nats + content * float(self.content_in_bias is not False)
        drifts = self.drift.drifts[:, None]
        near = torch.where(drifts, drifted.nats, key_bias) if self.content_in_bias == "far" else None
        ranks = torch.where(drifts, drifted_ranks(content, drifted.units), as_integers(rank))
        return DriftedKeys(ranks, torch.where(drifts, bias, key_bias), drifted, near)

    def _on_stripe(self, x: Tensor, cache: DriftingCache | None) -> Tensor:
        """Which positions of x belong to the stripe of each head, bool `[B or 1, G, N]`."""
        position = torch.arange(x.shape[1], device=x.device)[None]
        if cache is not None:
            position = position + cache.read[:, None]
        return position[:, None] % self.stripes == self.stripe[:, None]

    def content(self, x: Tensor, rank: Tensor) -> Tensor:
        """What ranks are without their drift, `[B, G, N]`; arguments as of `forward`."""
        if self.weight is None:
            return rank
        dtype = torch.promote_types(x.dtype, torch.float32)
        with without_autocast(x.device):
            content = F.linear(x.to(dtype), self.weight.to(dtype)).mT
            bounded = _LARGEST_CONTENT * torch.tanh(content / _LARGEST_CONTENT)
        return torch.where(self.drift.drifts[:, None], bounded, rank)
