"""Dynamic mask attention as a module.

B batch, N length, C hidden size, H query heads, G KV heads, D head dim.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from dma_kernels import (
    DynamicMaskCache,
    FullCache,
    KeepRule,
    KeyCache,
    Lifetimes,
    NewKeys,
    Packing,
    ScoreForm,
    key_ranks,
    rank_bias,
)
from dma_kernels.context import ContextGroup, exchange_keys
from dma_kernels.decoding.dynamic_cache import StepBackend
from dma_kernels.keep_rule import HasKeepRule, check_at_least
from dma_lightning.auxiliary_losses import with_auxiliary_loss
from dma_lightning.backends import (
    ATTENTIONS,
    Attention,
    Backend,
    attend,
    check_backend,
    explain_backend,
    resolve_backend,
)
from dma_lightning.mixers.base import GroupedQueryMixer, mean_keys, merge_heads, packed
from dma_lightning.mixers.drift import DriftingCache
from dma_lightning.mixers.drifting_ranks import DriftedKeys, DriftingRanks, DriftingRanksConfig
from dma_lightning.mixers.far_content import attend_with_far_bias
from dma_lightning.mixers.part_retention import LayerPart, part_retention_loss
from dma_lightning.mixers.retention import (
    RetentionQueries,
    RetentionTarget,
    check_retention,
    fused_retention_loss,
    retention_loss,
)


@dataclass(frozen=True, kw_only=True)
class DynamicMaskConfig(DriftingRanksConfig):
    """The settings that dynamic mask attention reads."""

    keep_window_size: int = 64
    """dma: number of best-ranked past keys that a query attends to."""
    keep_last: int = 0
    """dma: number of last positions that are visible whatever their rank; the best-ranked keys are chosen from the
    positions before these."""
    sinks: int = 0
    """dma: number of first keys of each document that also stay visible."""
    wide_layers: tuple[int, ...] = ()
    """dma: layers, counted from 0, that keep `wide_keep_window_size` best-ranked keys."""
    wide_keep_window_size: int = 0
    """dma: number of best-ranked keys that the `wide_layers` keep, instead of `keep_window_size`."""
    score_form: ScoreForm = "exp"
    """dma: bias that a key's rank adds to its logits: exp(rank), or the rank itself (linear). exp overflows above a
    rank of 88.7, which shows as a loss of NaN. Heads with a drift are always linear."""
    retention_weight: float = 0.0
    """dma: weight, such as 0.1, of a loss that trains ranks, without their drift, to predict attention to far keys; 0
    for none. Training steps must see such keys: use callbacks.MixedWindows."""
    retention_target: RetentionTarget = "attention"
    """dma: what ranks learn to predict: the attention that a key gets (attention), or its effect on the output
    (output). The effect of a key is small if its value is close to the mean of all values."""


@dataclass(frozen=True)
class WideLayers:
    """Layers that keep more or fewer keys than the others.

    Attributes:
        layers: their numbers, counted from 0.
        keep_window_size: number of best-ranked keys that each query in these layers keeps.

    Raises:
        ValueError: without layers, for a number below 0, or a size below 1.
    """

    layers: tuple[int, ...]
    keep_window_size: int

    def __post_init__(self) -> None:
        if not self.layers or min(self.layers) < 0:
            raise ValueError(
                f"wide_layers: expected numbers of layers, counted from 0, with wide_keep_window_size "
                f"{self.keep_window_size}, got {list(self.layers)}; list the layers, or remove both settings"
            )
        check_at_least("wide_keep_window_size", self.keep_window_size, 1)

    @classmethod
    def from_config(cls, config: DynamicMaskConfig) -> Self | None:
        """The wide layers of a configuration, or None."""
        if not config.wide_layers and not config.wide_keep_window_size:
            return None
        return cls(tuple(config.wide_layers), config.wide_keep_window_size)

    def has(self, layer: int, num_layers: int) -> bool:
        """Whether a layer is one of these layers.

        Raises:
            ValueError: if the model has fewer layers than a number says.
        """
        if max(self.layers) >= num_layers:
            raise ValueError(
                f"wide_layers: expected numbers from 0 to {num_layers - 1}, of the model's {num_layers} layers, got "
                f"{list(self.layers)}"
            )
        return layer in self.layers


class DynamicMaskAttention(HasKeepRule, GroupedQueryMixer[KeyCache | DriftingCache]):
    """Causal self-attention in which every query keeps the `keep_window_size` best-ranked keys of its past.

    The rank of a key is computed from the values at its position. Ranks select keys. A bias that is computed from the
    rank is also added to the logits of the key, so gradients train the selection. At initialization, the parameter `A`
    is 0, and the mask is exactly a sliding window of `keep_window_size + keep_last` positions, plus the sinks.

    Args:
        hidden_size: C, width of input and output.
        num_heads: H, query heads.
        num_kv_heads: G, key and value heads; H must be a multiple of it. Default: H.
        head_dim: D, even. Default: C / H.
        keep_window_size: number of best-ranked keys that a query keeps.
        keep_last: number of last positions that are visible whatever their rank; the best-ranked keys are chosen from
            the positions before these.
        sinks: number of first keys of each document that also stay visible.
        score_form: the bias that is added to the logits, `exp(rank)` (`exp`) or the rank itself (`linear`).
        rope_theta: base of the rotary embedding.
        rope_scaling: positions are divided by it before the rotary embedding.
        rms_norm_eps: epsilon of the RMSNorm on queries and keys.
        bias: whether the projections and Δ have a bias.
        backend: `triton`, `flex`, `torch` or `reference`. `auto` is `triton` on GPUs on which its tests have passed
            (Hopper), `flex` on other GPUs, and `torch` otherwise (on a CPU, in float64, for head dims above 256).
        drifting: a drift of the ranks and biases; by default none.
        retention_weight: weight of the retention loss.
        qk_norm: whether queries and keys are normalized.
        wide: the layers of a model that keep a different number of keys, and that number.
        retention_target: what the retention loss trains ranks to predict, `attention` or `output`.

    Raises:
        ValueError: if the sizes do not match, for an unknown backend or score form, for `exp` if all heads have a
            drift, or for a negative weight.

    Source: arXiv 2508.02124v6, section 3; details as in the Doge model of Hugging Face Transformers.
    """

    drawn_apart = ("dt_proj",)
    per_head_parameters = ("dt_proj.weight",)
    read_weights = ("dt_proj",)

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        keep_window_size: int = 1024,
        keep_last: int = 0,
        sinks: int = 0,
        score_form: ScoreForm = "exp",
        rope_theta: float = 10_000.0,
        rope_scaling: float = 1.0,
        rms_norm_eps: float = 1e-6,
        bias: bool = False,
        backend: Backend = "auto",
        drifting: DriftingRanks | None = None,
        retention_weight: float = 0.0,
        qk_norm: bool = True,
        wide: WideLayers | None = None,
        retention_target: RetentionTarget = "attention",
    ) -> None:
        super().__init__(
            hidden_size, num_heads, num_kv_heads, head_dim, rope_theta, rope_scaling, rms_norm_eps, bias, qk_norm
        )  # fmt: skip
        check_backend(backend)
        self.keep = KeepRule(keep_window_size, keep_last, sinks)
        self.own_keep = self.keep  # stays the same in steps in which `MixedWindows` keeps every key
        self.wide = wide
        self.score_form, self.backend = score_form, backend
        self.A = nn.Parameter(torch.zeros(self.num_kv_heads))
        with torch.random.fork_rng(devices=[]):  # so that all other weights start as with other mixers
            self.dt_proj = nn.Linear(self.num_kv_heads * self.head_dim, self.num_kv_heads, bias=bias)  # Δ
        rank_bias(self.A.detach(), score_form)  # an unknown form raises now, and not in the first step
        self.drifting = drifting
        if drifting is not None:
            self._check_drifting(drifting)
        check_retention(retention_weight, retention_target)
        if drifting is not None and drifting.weight is not None:
            self.undecayed_parameters = ("drifting.weight",)
            self.auxiliary_parameters = () if drifting.content_in_bias else self.undecayed_parameters
        own = ("A", "dt_proj", "drifting")
        self.selection_parameters = [name for name, _ in self.named_parameters() if name.split(".")[0] in own]
        self.retention_weight, self.retention_target, self.num_layers = retention_weight, retention_target, 1
        self.register_buffer("step", torch.zeros((), dtype=torch.int64), persistent=False)
        self.step: Tensor

    def _check_drifting(self, drifting: DriftingRanks) -> None:
        """Raise `ValueError` if the drift does not fit the score form or the keep rule."""
        if self.score_form != "linear" and not drifting.has_memories:
            raise ValueError(
                f"score_form: expected linear with a drift, since with exp the bias would not decay with age, got "
                f"{self.score_form!r}; set score_form linear, or give some heads no drift (memory_heads)"
            )
        if drifting.content_in_bias == "far" and not self.keep.last:
            raise ValueError(
                "keep_last: expected at least 1 with content_in_bias far, got 0; set content_in_bias true, which means "
                "the same if keep_last is 0"
            )

    @classmethod
    def from_config(cls, config: DynamicMaskConfig) -> Self:
        return cls(
            **cls.shape_of(config),
            keep_window_size=config.keep_window_size,
            keep_last=config.keep_last,
            sinks=config.sinks,
            score_form=config.score_form,
            backend=config.backend,
            drifting=DriftingRanks.from_config(config, config.keep_window_size + config.keep_last),
            retention_weight=config.retention_weight,
            retention_target=config.retention_target,
            wide=WideLayers.from_config(config),
        )

    def place(self, layer: int, num_layers: int) -> None:
        self.num_layers = num_layers
        if self.wide is not None and self.wide.has(layer, num_layers):
            self.keep_window_size = self.wide.keep_window_size
        if self.drifting is not None:
            self.drifting.place(layer, num_layers)

    def begin_step(self, step: int) -> None:
        if self.retention_weight:
            self.step.fill_(step)

    def forward(
        self,
        x: Tensor,
        packing: Packing | None = None,
        cache: KeyCache | DriftingCache | None = None,
    ) -> Tensor:
        q, k, v = self.queries_keys_values(x, cache)  # [B, H, N, D] and [B, G, N, D]
        keys = self._ranked(x, v, packing, cache, self.context)
        backend = resolve_backend(self.backend, q.device.type, q.device.index, q.dtype, self.head_dim, self.drifts)
        if cache is None:
            out = self._attend(backend, q, k, v, keys, packing)
            if self.retention_weight and self.training and torch.is_grad_enabled():
                out = with_auxiliary_loss(out, self._retention_loss(backend, x, q, k, v, keys, packing))
            return self.o_proj(merge_heads(out))
        kept = cache.keys if isinstance(cache, DriftingCache) else cache
        asked = None if keys.drifted is None else keys.drifted.query_bias
        new = NewKeys(k, v, keys.key_bias, keys.rank, packing, asked)
        return self.o_proj(merge_heads(kept.attend(q, new, ATTENTIONS[backend])))

    def _attend(
        self, backend: str, q: Tensor, k: Tensor, v: Tensor, keys: DriftedKeys, packing: Packing | None
    ) -> Tensor:
        asked = None if keys.drifted is None else keys.drifted.query_bias
        if self.context is not None:
            return self._attend_in_context(self.context, ATTENTIONS[backend], q, k, v, keys, packing)
        if keys.near_bias is None:
            return attend(backend, q, k, v, keys.key_bias, keys.rank, self.keep, packing, query_bias=asked)
        mask, near = Lifetimes.selected(keys.rank, self.keep, packing), self.own_keep.last
        return attend_with_far_bias(ATTENTIONS[backend], q, k, v, keys.near_bias, keys.key_bias, mask, near, asked)

    def _attend_in_context(
        self,
        context: ContextGroup,
        attention: Attention,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keys: DriftedKeys,
        packing: Packing | None,
    ) -> Tensor:
        """Attention of a part, `[B, H, n, D]`."""
        asked = None if keys.drifted is None else keys.drifted.query_bias
        if keys.near_bias is None:
            extended = exchange_keys(context, (k, v, keys.key_bias), keys.rank, self.keep, packing)
            return extended.attend(attention, q, asked)
        extended = exchange_keys(context, (k, v, keys.near_bias, keys.key_bias), keys.rank, self.keep, packing)
        k, v, near_bias, far_bias = extended.rows
        bias = None if asked is None else extended.with_queries(asked, first=True)
        out = attend_with_far_bias(
            attention, extended.with_queries(q), k, v, near_bias, far_bias, extended.lifetimes, self.own_keep.last, bias
        )
        return out[:, :, extended.earlier :]

    def join_context(self, context: ContextGroup | None) -> None:
        self.context = context

    @property
    def drifts(self) -> bool:
        """Whether heads have a drift."""
        return self.drifting is not None

    @property
    def near_distance(self) -> int | None:
        """How many last positions have a separate bias, given by `near_bias`; None if all keys have one bias."""
        far = self.drifting is not None and self.drifting.content_in_bias == "far"
        return self.own_keep.last if far else None

    def near_bias(self, x: Tensor, packing: Packing | None = None) -> Tensor | None:
        """Bias of keys among the last `near_distance` positions, `[B, G, N]`; None if all keys have one bias."""
        if self.near_distance is None:
            return None
        return self._ranked(x, self.heads(x, self.v_proj), packing).near_bias

    def _change(self, **sizes: int) -> None:
        super()._change(**sizes)
        self.own_keep = replace(self.own_keep, **sizes)

    def _retention_loss(
        self, backend: str, x: Tensor, q: Tensor, k: Tensor, v: Tensor, keys: DriftedKeys, packing: Packing | None
    ) -> Tensor:
        """The layer's retention loss with its weight; it trains only the parameters that make the content of ranks."""
        content = self._content(x.detach(), v.detach()) if keys.own_content is None else keys.own_content
        nats = None if keys.drifted is None else keys.drifted.nats
        values = v if self.retention_target == "output" else None
        length = x.shape[1] if self.context is None else x.shape[1] * self.context.size
        positions = RetentionQueries(self.own_keep.capacity).at(self.step, length, x.device)
        if self.context is None:
            loss_of = fused_retention_loss if backend == "triton" else retention_loss
            loss = loss_of(q, k, content, nats, positions, self.own_keep, packing, values)
        else:
            part = LayerPart(q, k, content, nats, values)
            loss = part_retention_loss(self.context, part, positions, self.own_keep, packing)
        return self.retention_weight / self.num_layers * loss

    def _ranked(
        self,
        x: Tensor,
        v: Tensor,
        packing: Packing | None,
        cache: KeyCache | DriftingCache | None = None,
        context: ContextGroup | None = None,
    ) -> DriftedKeys:
        ranks = self._published(v)
        key_bias = rank_bias(ranks, self.score_form)
        if self.drifting is None:
            return DriftedKeys(ranks, key_bias)
        return self.drifting(x, ranks, key_bias, packing, cache, context)

    def _published(self, v: Tensor) -> Tensor:
        """Ranks as published, `[B, G, N]`; `[1, 1, 1]` in layers that do not read them."""
        if self.drifting is None or self.drifting.reads_published:
            return key_ranks(v, self.A, self.dt_proj.weight, self.dt_proj.bias)
        unread = torch.stack([x.sum() for x in (self.A, *self.dt_proj.parameters())]).sum() * 0
        # Not just zeros: DDP waits for the gradient of every parameter.
        return unread.to(torch.promote_types(v.dtype, torch.float32)).view(1, 1, 1)

    def content(self, x: Tensor) -> Tensor:
        """The content of keys, their ranks without a drift, `[B, G, N]`, for the layer's input x `[B, N, C]`."""
        return self._content(x, self.heads(x, self.v_proj))

    def _content(self, x: Tensor, v: Tensor) -> Tensor:
        ranks = self._published(v)
        return ranks if self.drifting is None else self.drifting.content(x, ranks)

    def lifetimes(
        self,
        x: Tensor,
        packing: Packing | Tensor | None = None,
        padding: Tensor | None = None,
        *,
        documents: Tensor | None = None,
    ) -> tuple[Lifetimes, Tensor]:
        """The mask that a forward pass over x `[B, N, C]` selects, and the bias of every key `[B, G, N]`.

        x is a whole sequence, even if `join_context` divides the sequences of `forward`.

        If only far keys have their content in the bias, this is the bias of far keys.
        """
        packing = packed(x, packing, documents, padding)
        keys = self._ranked(x, self.heads(x, self.v_proj), packing)
        return Lifetimes.selected(keys.rank, self.keep, packing), keys.key_bias

    def new_cache(self, batch: int, full: bool = False) -> KeyCache | DriftingCache:
        """An empty cache for `batch` sequences on the module's device.

        Args:
            batch: B.
            full: keep every key, for comparison or to change the cache's keep rule later.

        The small cache holds keys and values in the dtype of autocast if it is on, and otherwise in that of the
        weights. Its steps run as a Triton kernel if the module's backend is `triton`, and otherwise in plain PyTorch.
        """
        if self.near_distance is not None:
            raise ValueError(
                "content_in_bias: expected true or false to generate or to use a cache, got far, which works only in "
                "training; call the model without a cache"
            )
        keys = self._new_key_cache(batch, full)
        if self.drifting is None:
            return keys
        return DriftingCache.empty(keys, batch, self.drifting.drift)

    def _new_key_cache(self, batch: int, full: bool) -> KeyCache:
        weight = self.k_proj.weight
        if full:
            return FullCache(batch, self.keep, device=weight.device)
        device = weight.device
        autocasts = torch.is_autocast_enabled(device.type) and weight.dtype != torch.float64
        dtype = torch.get_autocast_dtype(device.type) if autocasts else weight.dtype
        backend = resolve_backend(self.backend, device.type, device.index, dtype, self.head_dim, self.drifts)
        step: StepBackend = "triton" if backend == "triton" else "torch"
        return DynamicMaskCache(
            batch, self.num_kv_heads, self.head_dim, self.keep, dtype=dtype, device=device, backend=step
        )

    def mixing_flops(self, length: int) -> float:
        flops = 4 * self.num_heads * self.head_dim * mean_keys(length, self.keep.capacity)
        return flops if self.near_distance is None else 2 * flops  # `attend_with_far_bias`

    def cache_elements(self, length: int) -> int:
        """Keys, values and biases; the rank and position of each key, which the cache also keeps, do not count."""
        return min(length, self.keep.capacity) * self.num_kv_heads * (2 * self.head_dim + 1)

    def computed_by(self, device: torch.device, dtype: torch.dtype) -> str:
        return explain_backend(self.backend, device.type, device.index, dtype, self.head_dim, self.drifts)

    def unused_at(self, length: int) -> str | None:
        kept = self.keep.window + self.keep.last
        if kept < length:
            return None
        sizes = f"keep_window_size {self.keep.window}" + f" + keep_last {self.keep.last}" * (self.keep.last > 0)
        return (
            f"{sizes} >= sequence length {length}: no key is ever dropped, so the selection is not trained; lower "
            "keep_window_size to train it"
        )
