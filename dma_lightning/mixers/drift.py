"""A drift of ranks and biases: with each new position, all keys before it fall behind by the step of that position.

    D_j = d_1 + ... + d_j,  d_l >= 0        rank_j = content_j + D_j        bias_tj = content_j + D_j - D_t

Ranks are compared as exact integers, and biases are rounded after the subtraction. A query's D_t is the same for all of
its keys, so softmax ignores it. A drift of 0 does not change the ranks. A large drift makes the selection a sliding
window. The bias decays with age: with equal steps it is ALiBi with a learned slope, and with steps that depend on the
layer's input it is the forget gate of the Forgetting Transformer.

B batch, N length, C hidden size, G KV heads.

Source: arXiv 2503.02130 (forget gate), 2108.12409 (ALiBi).
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dma_kernels.context import ContextGroup, drift_before
from dma_kernels.fixed_point import drifts
from dma_lightning.mixers.base import MixerConfig
from dma_lightning.mixers.narrow_linear import narrow_linear

DriftForm = Literal["none", "constant", "gate"]

_LARGEST_STEP = 8.0  # two such steps forget everything


@dataclass(frozen=True, kw_only=True)
class DriftConfig(MixerConfig):
    """The settings that a drift reads."""

    drift: DriftForm = "none"
    """dma, swa, mha: how keys fall behind with every position: none (they do not), constant (a learned slope for each
    KV head), or gate (steps that depend on the layer's input). In dma, ranks and biases fall behind, so the selection
    changes too. In swa and mha, only biases do."""
    drift_range: tuple[float, float] = (0.125, 4.0)
    """dma, swa, mha: smallest and largest initial drift of a KV head, in nats per window (keep_window_size + keep_last
    in dma, sliding_window in swa and mha). The heads of all layers get values between the two, in geometric steps. Each
    layer has small and large ones."""


class Drift(nn.Module):
    """Steps d_l of each position and KV head.

    Args:
        form: `constant`, d = exp(theta) / window with a learned theta; or `gate`, d = softplus(W x + b), limited to 8,
            with W = 0 at the start.
        hidden_size: C.
        num_kv_heads: G.
        window: number of positions in the unit "nats per window".
        drift_range: smallest and largest initial drift of a head, in nats per window.

    Raises:
        ValueError: for an unknown form, or a range that is not two positive numbers, the smaller one first.
    """

    def __init__(
        self, form: DriftForm, hidden_size: int, num_kv_heads: int, window: int, drift_range: tuple[float, float]
    ) -> None:
        super().__init__()
        if form not in get_args(DriftForm) or form == "none":
            raise ValueError(f"drift: expected one of {list(get_args(DriftForm))}, got {form!r}")
        least, largest = drift_range
        if not 0 < least <= largest < math.inf:
            raise ValueError(f"drift_range: expected two numbers above 0, the smaller one first, got {drift_range}")
        self.form, self.num_kv_heads, self.window, self.range = form, num_kv_heads, window, (least, largest)
        self.rate = nn.Parameter(torch.zeros(num_kv_heads))  # theta, or b of the gate
        self.weight = nn.Parameter(torch.zeros(num_kv_heads, hidden_size)) if form == "gate" else None
        self.register_buffer("drifts", torch.ones(num_kv_heads, dtype=torch.bool), persistent=False)
        self.drifts: Tensor  # which heads have a drift; the others have steps of 0
        self.place(0, 1)

    @classmethod
    def from_config(cls, config: DriftConfig, window: int) -> Self | None:
        """The drift of a configuration, in nats per `window` positions; None if it has none.

        Raises:
            ValueError: as for the class.
        """
        if config.drift == "none":
            return None
        return cls(config.drift, config.hidden_size, config.num_key_value_heads, window, config.drift_range)

    @torch.no_grad()
    def place(self, layer: int, num_layers: int, without: int = 0) -> None:
        """Set the initial drifts to those of a layer.

        Args:
            layer: number of the layer, from 0.
            num_layers: number of layers of the model.
            without: this many first heads of the layer have no drift.
        """
        heads = self.num_kv_heads
        self.drifts.copy_(torch.arange(heads) >= without)
        least, largest = self.range
        among = max(1, (heads - without) * num_layers - 1)
        number = (torch.arange(heads) - without).clamp(min=0) * num_layers + layer  # small and large ones in each layer
        nats = least * (largest / least) ** (number / among).double()
        self.rate.copy_(nats.log() if self.form == "constant" else (nats / self.window).expm1().log())

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """Steps `[B, G, N]` for the layer's input x `[B, N, C]`, in at least float32; 0 at padding `[B, N]`."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        rate = self.rate.to(dtype)[:, None]  # [G, 1]
        if self.weight is None:
            steps = (rate.exp() / self.window).expand(x.shape[0], -1, x.shape[1])
        else:
            steps = F.softplus(narrow_linear(x, self.weight).mT + rate).clamp(max=_LARGEST_STEP)
        steps = steps.masked_fill(~self.drifts[:, None], 0)
        return steps if padding is None else steps.masked_fill(padding[:, None], 0)


class Drifted(NamedTuple):
    """How far the keys have drifted up to each position, `[B, G, N]`.

    Attributes:
        units: D as an integer, in units of 2^-32 nats (`dma_kernels.fixed_point`), for ranks.
        nats: D in float64, with gradients to the steps, for biases. NaN from a NaN step on.
    """

    units: Tensor
    nats: Tensor

    @property
    def query_bias(self) -> Tensor:
        """-D_t of the queries, `[B, G, N]`.

        Softmax ignores it, and its exact gradient is 0. It serves two purposes. First, it makes the bias of a key small
        before it is rounded. Second, the gradients of the keys' D are sums of rounded numbers, and the gradient of a
        step is the sum of these over all later positions. The queries' gradients are rounded in the same way. Without
        them, the gradients of the steps would be wrong by several percent in bfloat16.
        """
        return -self.nats


def add_up_parts(steps: Tensor, context: ContextGroup) -> Drifted:
    """D of the steps of a part `[B, G, n]`, including the drift of earlier parts; all processes call it."""
    own = add_up(steps)
    units, nats = drift_before(context, own.units[..., -1], own.nats[..., -1])
    drifted = add_up(steps, units)
    # `units` already include the earlier parts. This adds their gradient, and NaN if they contain a NaN step.
    return Drifted(drifted.units, drifted.nats + (nats - nats.detach())[..., None])


def add_up(steps: Tensor, start: Tensor | None = None) -> Drifted:
    """D of steps `[B, G, N]` in nats; `start` is D before them, in units, int64 `[B, G]`, by default 0."""
    return Drifted(*drifts(steps, start))


class DriftingCache:
    """A cache of keys, and the drift of their heads so far. For inference.

    Args:
        keys: the cache of the keys.
        total: sum of the drift over all positions read so far, in units of 2^-32 nats, int64 `[B, G]`.
    """

    def __init__(self, keys: Any, total: Tensor) -> None:
        self.keys, self.total = keys, total
        self.broken = torch.zeros_like(total, dtype=torch.bool)
        """Whether a step has been NaN, `[B, G]`."""
        self.read = torch.zeros(len(total), dtype=torch.int64, device=total.device)
        """Positions read so far, padded ones included, `[B]`."""

    @classmethod
    def empty(cls, keys: Any, batch: int, drift: Drift) -> Self:
        """A drifting cache around an empty cache of keys."""
        return cls(keys, torch.zeros(batch, drift.num_kv_heads, dtype=torch.int64, device=drift.rate.device))

    @property
    def length(self) -> Tensor:
        """Positions read so far, int64 `[B]`."""
        return self.keys.length

    def select(self, rows: Tensor) -> None:
        """Keep these sequences, in this order; a row may occur several times."""
        self.keys.select(rows)
        self.total, self.broken, self.read = (x.index_select(0, rows) for x in (self.total, self.broken, self.read))

    def advance(self, steps: Tensor) -> Drifted:
        """D of new positions, which continues from the positions read before; the total is updated."""
        units, nats = add_up(steps.detach(), self.total)
        nats = nats.masked_fill(self.broken[..., None], torch.nan)
        self.total, self.broken, self.read = units[..., -1], nats[..., -1].isnan(), self.read + steps.shape[-1]
        return Drifted(units, nats)
