"""Ranks and biases of keys in layers with a drift, where some heads may rank without a drift, as published.

A head with a drift is a window whose edge its content can move. A head without one is a memory. A layer may have both.

B batch, N length, C hidden size, G KV heads.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor, nn

from dma_kernels import Packing
from dma_kernels.context import ContextGroup
from dma_kernels.fixed_point import drifted_ranks
from dma_kernels.ranks import as_integers
from dma_lightning.mixers.drift import Drift, DriftConfig, Drifted, DriftingCache, add_up, add_up_parts
from dma_lightning.mixers.narrow_linear import narrow_linear

Content = Literal["values", "input"]
ContentInBias = bool | Literal["far"]

_OPTIONS = ("content", "content_in_bias", "memory_heads", "memory_every", "memory_stripes")
_STRIPE = 4.0  # nats that a key on a head's own stripe is ahead of others, until contents have learned more
_LARGEST_CONTENT = 8.0  # bound of a content that comes from the layer's input, in nats


@dataclass(frozen=True, kw_only=True)
class DriftingRanksConfig(DriftConfig):
    """The settings that ranks with a drift read."""

    content: Content = "values"
    """dma with a drift: what makes the content of a rank, its part without the drift: the values at a position, as
    published (values), or the layer's input through a linear map that starts at 0 (input)."""
    content_in_bias: ContentInBias = True
    """dma with a drift: whether content is also added to the logits: of all keys (true), of none, so that it only ranks
    keys (false), or of keys that are no longer among the last `keep_last` positions (far; only for training, since
    caches do not support it)."""
    memory_heads: float = 0.0
    """dma with a drift: number of KV heads of a layer that have no drift, and rank and add biases as published; below
    1, their share."""
    memory_every: int = 1
    """dma with a drift: every how many layers there are memory heads, starting with the first layer."""
    memory_stripes: int = 0
    """dma with memory heads: S. Each memory head prefers every S-th position, and the next head prefers the positions
    right after these. So the heads remember different keys, and together all of them. 0: no preference."""


class DriftedKeys(NamedTuple):
    """Ranks and biases of a layer's keys, `[B, G, N]` each; with a drift, ranks are int64 and biases float64."""

    rank: Tensor
    key_bias: Tensor
    drifted: Drifted | None = None  # only with a drift
    near_bias: Tensor | None = None  # bias of keys among the last positions, if it differs
    own_content: Tensor | None = None  # content for the retention loss, if only that loss trains it


class DriftingRanks(nn.Module):
    """Adds a drift to the ranks of a layer.

    Args:
        drift: the drift of all KV heads.
        hidden_size: C.
        content: `values` or `input`.
        content_in_bias: whether the content is part of the bias; `far`: only for keys that are no longer among the last
            positions.
        memory_heads: how many KV heads have no drift; below 1, their share.
        memory_every: every how many layers there are such heads.
        memory_stripes: S. Memory head m, counted over all layers, ranks the keys at positions j with j mod S = m mod S
            above others. With 0, it treats all positions alike.

    Raises:
        ValueError: for an unknown content, more memory heads than KV heads, or stripes without memory heads.
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
                f"memory_heads: expected 0 to {heads} KV heads, or a share below 1 that gives a whole number, got "
                f"{memory_heads}"
            )
        if not isinstance(content_in_bias, bool) and content_in_bias != "far":
            raise ValueError(f"content_in_bias: expected true, false or far, got {content_in_bias!r}")
        if memory_every < 1:
            raise ValueError(f"memory_every: expected at least 1, got {memory_every}")
        if memory_stripes < 0 or (memory_stripes and not count):
            raise ValueError(
                f"memory_stripes: expected 0, or at least 1 with memory_heads above 0, got {memory_stripes} with "
                f"memory_heads {memory_heads}"
            )
        self.drift, self.content_in_bias = drift, content_in_bias
        self.memory_heads, self.memory_every, self.stripes = int(count), memory_every, memory_stripes
        self.register_buffer("stripe", torch.zeros(heads, dtype=torch.int64), persistent=False)
        self.stripe: Tensor  # number of each head's stripe
        self.weight = nn.Parameter(torch.zeros(heads, hidden_size)) if content == "input" else None
        self.place(0, 1)

    @classmethod
    def from_config(cls, config: DriftingRanksConfig, window: int) -> Self | None:
        """The drifting ranks of a configuration, in nats per `window` positions; None if it has no drift.

        Raises:
            ValueError: if it has no drift, but sets options that need one.
        """
        drift = Drift.from_config(config, window)
        options = {name: getattr(config, name) for name in _OPTIONS}
        if drift is not None:
            return cls(drift, config.hidden_size, **options)
        defaults = DriftingRanksConfig()
        if changed := {name: value for name, value in options.items() if value != getattr(defaults, name)}:
            raise ValueError(
                f"drift: expected constant or gate with {changed}, got none; set a drift, or remove these options"
            )
        return None

    def place(self, layer: int, num_layers: int) -> None:
        """Set which heads of a layer have a drift, and their initial drifts."""
        self.drift.place(layer, num_layers, 0 if layer % self.memory_every else self.memory_heads)
        if self.stripes:
            first = layer // self.memory_every * self.memory_heads
            self.stripe.copy_((first + torch.arange(len(self.stripe))) % self.stripes)

    @property
    def has_memories(self) -> bool:
        """Whether some layers have heads without a drift."""
        return self.memory_heads > 0

    @property
    def reads_published(self) -> bool:
        """Whether any layer reads ranks and biases as published."""
        return self.weight is None or self.has_memories

    def forward(
        self,
        x: Tensor,
        rank: Tensor,
        key_bias: Tensor,
        packing: Packing | None = None,
        cache: DriftingCache | None = None,
        context: ContextGroup | None = None,
    ) -> DriftedKeys:
        """Ranks and biases with the drift.

        Args:
            x: the layer's input `[B, N, C]`.
            rank: ranks as published, `[B, G, N]`; `[1, 1, 1]` if they are not read.
            key_bias: biases as published, same shape.
            packing: documents, which make no difference here, and padding, which has steps of 0.
            cache: the cache of the positions before, which is advanced.
            context: the processes that have the other parts of the sequences, if x is a part and there is no cache.
        """
        steps = self.drift(x, None if packing is None else packing.padding)
        content, own_content = self._content_and_own(x, rank)
        if self.stripes:
            rank = rank + _STRIPE * self._on_stripe(x, cache, context)
        if cache is not None:
            drifted = cache.advance(steps)
        else:
            drifted = add_up(steps) if context is None else add_up_parts(steps, context)
        # Content is multiplied by 0 and not left out, so that a NaN shows in the loss.
        bias = drifted.nats + content * float(self.content_in_bias is not False)
        drifts = self.drift.drifts[:, None]
        near = torch.where(drifts, drifted.nats, key_bias) if self.content_in_bias == "far" else None
        ranks = torch.where(drifts, drifted_ranks(content, drifted.units), as_integers(rank))
        return DriftedKeys(ranks, torch.where(drifts, bias, key_bias), drifted, near, own_content)

    def _content_and_own(self, x: Tensor, rank: Tensor) -> tuple[Tensor, Tensor | None]:
        """Content for ranks and biases, and content for the retention loss if only that loss trains it.

        In that case, the first has a gradient of 0. Its real gradient, with that of x, would cost as much as another
        gate.
        """
        if self.content_in_bias is not False or self.weight is None:
            return self.content(x, rank), None
        own = self.content(x.detach(), rank.detach())
        return own.detach() + self.weight.sum() * 0, own  # since DDP waits for the gradient of every parameter

    def _on_stripe(self, x: Tensor, cache: DriftingCache | None, context: ContextGroup | None) -> Tensor:
        """Which positions of x belong to the stripe of each head, bool `[B or 1, G, N]`."""
        position = torch.arange(x.shape[1], device=x.device)[None]
        if cache is not None:
            position = position + cache.read[:, None]
        elif context is not None:
            position = context.positions(x.shape[1], x.device)
        return position[:, None] % self.stripes == self.stripe[:, None]

    def content(self, x: Tensor, rank: Tensor) -> Tensor:
        """Ranks without their drift, `[B, G, N]`; arguments as in `forward`."""
        if self.weight is None:
            return rank
        content = narrow_linear(x, self.weight).mT
        bounded = _LARGEST_CONTENT * torch.tanh(content / _LARGEST_CONTENT)
        return torch.where(self.drift.drifts[:, None], bounded, rank)
