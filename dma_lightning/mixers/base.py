"""The interface of a token mixer, the part of a layer that mixes tokens; and what all mixers with KV heads share.

B batch, N length, C hidden size, H query heads, G KV heads, D head dim.
"""

import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypedDict, TypeVar, cast

import torch
from torch import Tensor, nn

from dma_kernels import Packing
from dma_kernels.context import ContextGroup
from dma_lightning.backends import Backend
from dma_lightning.rotary import apply_rope


@dataclass(frozen=True, kw_only=True)
class MixerConfig:
    """The settings that all mixers read."""

    hidden_size: int = 128
    """Width of the residual stream."""
    num_attention_heads: int = 4
    """Number of query heads."""
    num_key_value_heads: int = 2
    """Number of key and value heads; the number of query heads must be a multiple of it."""
    head_dim: int | None = None
    """Width of a head, an even number; by default hidden_size / num_attention_heads."""
    rope_theta: float = 10_000.0
    """Base of the rotary position embedding."""
    rope_scaling: float = 1.0
    """Positions are divided by this before the rotary embedding (position interpolation); 1 does not change them."""
    rms_norm_eps: float = 1e-6
    """Epsilon of every RMSNorm."""
    attention_bias: bool = False
    """Whether the projections of the attention have a bias, Δ included. The gates and the compression of nsa and the
    up-projection of mla's latent vectors never have one."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    qk_norm: bool = True
    """Whether each head of queries and keys gets an RMSNorm with learned scales (mla does not have it)."""
    backend: Backend = "auto"
    """Attention backend of dma, swa and nsa: auto (the fastest one that supports the inputs), triton (CUDA), flex
    (compiled FlexAttention; trains only on CUDA), torch (any device), or reference (O(N²), for tests). mha, mla and a
    window that holds the whole sequence use PyTorch's own attention."""


class MixerCache(Protocol):
    """The state that a token mixer keeps of the tokens it has read."""

    if TYPE_CHECKING:  # a cache may compute it

        @property
        def length(self) -> Tensor:
            """Positions read so far, int64 `[B]`."""

    else:  # with a property here, a subclass could not assign it
        length: Tensor

    def select(self, rows: Tensor) -> None:
        """Keep these sequences, in this order; a row may occur several times."""


Cache = TypeVar("Cache", bound=MixerCache)


class HeadShape(TypedDict):
    """The arguments of `GroupedQueryMixer`, as a model's configuration gives them."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int | None
    rope_theta: float
    rope_scaling: float
    rms_norm_eps: float
    bias: bool
    qk_norm: bool


class TokenMixer(nn.Module, ABC, Generic[Cache]):
    """Mixes the tokens of a sequence causally. This is all that a decoder knows about an attention.

    A subclass is made from a `ModelConfig`, and found by its name in `MIXERS`. For type checkers, it may name the class
    of its cache: `class MyMixer(TokenMixer[MyCache])`.

    Attributes:
        auxiliary_parameters: names of the mixer's parameters that only an auxiliary loss trains
            (`dma_lightning.auxiliary_losses`). Their gradients are clipped by their own norm, so such a loss does not
            shorten the step of other parameters.
        undecayed_parameters: names of the mixer's matrices that have no weight decay, as vectors have none.
        per_head_parameters: names of the mixer's linear weights that compute a few separate numbers for each head. Muon
            leaves them, as well as `auxiliary_parameters`, to AdamW.
        selection_parameters: names of the mixer's parameters that decide which keys are kept.
        read_weights: names of the mixer's linear maps whose weight is read, at least sometimes, without calling the
            map. An adapter of such a map would be ignored, so `dma_lightning.lora` refuses it.
        drawn_apart: names of the mixer's linear maps whose initial weights come from separate random numbers. If two
            mixers differ only in such maps, all other weights of their models start the same.
        context: the processes among which each sequence is divided; None if it is not. See `join_context`.
    """

    auxiliary_parameters: Sequence[str] = ()
    undecayed_parameters: Sequence[str] = ()
    per_head_parameters: Sequence[str] = ()
    selection_parameters: Sequence[str] = ()
    read_weights: Sequence[str] = ()
    drawn_apart: Sequence[str] = ()
    context: ContextGroup | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own, mixer, renamed = vars(cls), cast("Any", cls), []  # mypy does not let methods be replaced
        if "of_config" in own and "from_config" not in own:
            renamed.append("of_config is called from_config")
            mixer.from_config = own["of_config"]
        elif "from_config" in own:
            mixer.of_config = own["from_config"]
        if "forward" in own:
            takes_tensors = "documents" in inspect.signature(own["forward"]).parameters
            renamed += ["forward takes `packing` instead of documents and padding"] * takes_tensors
            mixer.forward = _packing(own["forward"], takes_tensors)
        if renamed:
            warnings.warn(f"{cls.__qualname__}: {' and '.join(renamed)} now", FutureWarning, stacklevel=3)

    @classmethod
    @abstractmethod
    def from_config(cls, config: Any) -> Self:
        """The mixer of one layer.

        Args:
            config: the `ModelConfig`. Mixers of this package name the part of it that is defined beside them. Other
                mixers find their own settings in `attention_args`.
        """

    @abstractmethod
    def forward(
        self,
        x: Tensor,
        packing: Packing | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Mix the tokens of each sequence, including those that its cache has read before.

        Args:
            x: `[B, N, C]`.
            packing: documents, whose queries see only keys of their own document, and padding, which no query sees.
            cache: made by `new_cache`; x continues where it ends, and is added to it. For inference.

        Returns:
            `[B, N, C]`.

        Raises:
            ValueError: on a wrong shape, dtype or device.
        """

    def place(self, layer: int, num_layers: int) -> None:
        """Set up for a layer, numbered from 0, before weights are loaded; most mixers are the same in all layers."""

    def begin_step(self, step: int) -> None:
        """Called with the number of the optimizer step before its forward passes; most mixers ignore it."""

    def join_context(self, context: ContextGroup | None) -> None:
        """Divide sequences among the processes of a group, one part for each; None: whole sequences.

        Without a cache, the mixer then takes only this process's part. All processes of the group call it together,
        forward and backward, with parts of equal length and a packing from `ContextGroup.pack`.

        Raises:
            ValueError: if the mixer does not support this.
        """
        if context is not None:
            raise ValueError(
                f"attention: expected dma or swa where a sequence is divided among processes, got "
                f"{type(self).__name__}, whose queries need all earlier keys; choose one of these, or do not divide it"
            )

    @abstractmethod
    def new_cache(self, batch: int, full: bool = False) -> Cache:
        """An empty cache for `batch` sequences on the module's device.

        Args:
            batch: B.
            full: keep every position, for comparison, even if fewer are enough.
        """

    @abstractmethod
    def mixing_flops(self, length: int) -> float:
        """FLOPs per token of a forward pass without the products with weights, as a mean over `length` positions.

        A multiplication and an addition count as two.
        """

    @abstractmethod
    def cache_elements(self, length: int) -> int:
        """Numbers that the cache of a sequence holds after `length` positions."""

    def computed_by(self, device: torch.device, dtype: torch.dtype) -> str:
        """What computes the mixing of a whole sequence on this device in this dtype, and why; text for a summary."""
        return "PyTorch"

    def unused_at(self, length: int) -> str | None:
        """Why sequences of this length do not train the whole mixer, or None if they do."""
        return None


class GroupedQueryMixer(TokenMixer[Cache]):
    """Query heads in groups that share a KV head, QK-norm before the rotary embedding, and an output projection.

    Args:
        hidden_size: C, width of input and output.
        num_heads: H, query heads.
        num_kv_heads: G, key and value heads; H must be a multiple of it. Default: H.
        head_dim: D, even. Default: C / H.
        rope_theta: base of the rotary embedding.
        rope_scaling: positions are divided by it before the rotary embedding.
        rms_norm_eps: epsilon of the RMSNorm on queries and keys.
        bias: whether the projections have a bias.
        qk_norm: whether queries and keys are normalized.

    Raises:
        ValueError: if the sizes do not match.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_theta: float = 10_000.0,
        rope_scaling: float = 1.0,
        rms_norm_eps: float = 1e-6,
        bias: bool = False,
        qk_norm: bool = True,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}; in the "
                "configuration of a model, they are num_attention_heads and num_key_value_heads"
            )
        if head_dim is None and hidden_size % num_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_heads, got {hidden_size} and {num_heads}; or set head_dim"
            )
        head_dim = hidden_size // num_heads if head_dim is None else head_dim
        check_even("head_dim", head_dim)
        self.hidden_size, self.head_dim = hidden_size, head_dim
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.rope_theta, self.rope_scaling = rope_theta, rope_scaling

        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=bias)
        self.q_norm = nn.RMSNorm(head_dim, eps=rms_norm_eps) if qk_norm else None
        self.k_norm = nn.RMSNorm(head_dim, eps=rms_norm_eps) if qk_norm else None

    @staticmethod
    def shape_of(config: MixerConfig) -> HeadShape:
        """The arguments above, from a model's configuration."""
        return {
            "hidden_size": config.hidden_size,
            "num_heads": config.num_attention_heads,
            "num_kv_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "rope_theta": config.rope_theta,
            "rope_scaling": config.rope_scaling,
            "rms_norm_eps": config.rms_norm_eps,
            "bias": config.attention_bias,
            "qk_norm": config.qk_norm,
        }

    def heads(self, x: Tensor, projection: nn.Module, norm: nn.RMSNorm | None = None) -> Tensor:
        """`x` projected to heads `[B, heads, N, D]`, and normalized if `norm` is given."""
        y = projection(x).unflatten(-1, (-1, self.head_dim))
        return (y if norm is None else normalized(y, norm)).transpose(1, 2)

    def queries_keys_values(self, x: Tensor, cache: MixerCache | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[B, H, N, D]`, keys and values `[B, G, N, D]`, after QK-norm and rotation; checks x."""
        check_mixer_input(x, self.q_proj.weight)
        positions = positions_of(x, cache)
        if self.context is not None and cache is None:
            positions = self.context.positions(x.shape[1], x.device)
        q = self.rotated(self.heads(x, self.q_proj, self.q_norm), positions)
        k = self.rotated(self.heads(x, self.k_proj, self.k_norm), positions)
        return q, k, self.heads(x, self.v_proj)

    def rotated(self, x: Tensor, positions: Tensor | None) -> Tensor:
        """`x` [B, heads, N, D] after the rotary embedding."""
        return apply_rope(x, self.rope_theta, positions, self.rope_scaling)


def merge_heads(x: Tensor) -> Tensor:
    """`[B, H, N, D] -> [B, N, H * D]`, the input of an output projection."""
    return x.transpose(1, 2).flatten(2)


def packed(
    x: Tensor, packing: Packing | Tensor | None, documents: Tensor | None = None, padding: Tensor | None = None
) -> Packing | None:
    """The packing of x `[B, N, C]`, given as a packing or as documents and padding `[B, N]`; None if there is none.

    Raises:
        ValueError: if documents or padding do not fit x, or are given together with a packing.
    """
    if not isinstance(packing, Packing):
        documents = documents if packing is None else packing
        if x.ndim != 3 or not x.shape[-1]:  # the forward pass raises for this
            return Packing.of(documents, padding)
        return Packing.of(documents, padding, batch=len(x), like=x[..., 0])
    if documents is not None or padding is not None:
        raise ValueError("expected either documents and padding or a packing, got both; a packing contains them")
    return None if packing.documents is None and packing.padding is None else packing


def _packing(forward: Callable[..., Tensor], takes_tensors: bool) -> Callable[..., Tensor]:
    """A `forward` that also takes documents and padding separately, by name or as `(x, documents, padding)`."""

    @wraps(forward)
    def taking(
        self: TokenMixer,
        x: Tensor,
        packing: Packing | Tensor | None = None,
        *others: Any,
        cache: MixerCache | None = None,
        documents: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        for other in others:  # padding, cache or both
            if isinstance(other, Tensor):
                padding = other
            elif other is not None:
                cache = other
        packing = packed(x, packing, documents, padding)
        if not takes_tensors:
            return forward(self, x, packing, cache)
        packing = packing or Packing()
        return forward(self, x, packing.documents, packing.padding, cache)

    return taking


def normalized(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """`x` after a norm, in its own dtype. The norm runs in the dtype of its weight, since only then torch fuses it."""
    return norm(x.to(norm.weight.dtype)).to(x.dtype)


def positions_of(x: Tensor, cache: MixerCache | None) -> Tensor | None:
    """Positions of x `[B, N, C]`, int64 `[B, N]`; None if they are 0 … N-1.

    Raises:
        ValueError: if the cache is for another number of sequences, or on another device.
    """
    if cache is None:
        return None
    length = cache.length
    if length.device != x.device:
        raise ValueError(
            f"x: expected on {length.device} as the cache, got {x.device}; make a cache where the model is"
        )
    if len(length) != len(x):
        raise ValueError(f"x: expected {len(length)} sequences as in the cache, got {len(x)}; make a cache for as many")
    return length[:, None] + torch.arange(x.shape[1], device=x.device)


def check_mixer_input(x: Tensor, weight: Tensor) -> None:
    """Raise `ValueError` unless x is `[B, N >= 1, C]` and fits the weight `[..., C]` in size, dtype and device."""
    if x.ndim != 3 or x.shape[-1] != weight.shape[-1] or x.shape[1] == 0:
        raise ValueError(f"expected x [B, N >= 1, {weight.shape[-1]}], got {list(x.shape)}")
    if x.device != weight.device or (x.dtype != weight.dtype and not _autocasts(x)):
        raise ValueError(
            f"expected x {weight.dtype} on {weight.device} as the weights, got {x.dtype} on {x.device}; "
            "convert or move x or the module, or use autocast"
        )


def check_even(name: str, size: int) -> None:
    """Raise `ValueError` unless a size is even, as the rotary embedding needs."""
    if size < 2 or size % 2:
        raise ValueError(f"{name}: rotary embedding needs an even number >= 2, got {size}")


def mean_keys(length: int, window: int | None = None) -> float:
    """How many keys a query sees on average over `length` positions: the last `window` of its past, or all."""
    window = length if window is None else min(window, length)
    return window - window * (window - 1) / (2 * length)


def _autocasts(x: Tensor) -> bool:
    """Whether autocast would convert `x` in a linear layer."""
    device = x.device.type
    return x.is_floating_point() and device != "meta" and torch.is_autocast_enabled(device)
