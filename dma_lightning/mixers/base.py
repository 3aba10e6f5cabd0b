"""What a decoder asks of the part of a layer that mixes tokens, and what those with heads have in common.

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
from dma_lightning.backends import Backend
from dma_lightning.rotary import apply_rope


@dataclass(frozen=True, kw_only=True)
class MixerConfig:
    """What mixers of any kind take of a model's configuration."""

    hidden_size: int = 128
    """Width of the residual stream."""
    num_attention_heads: int = 4
    """Number of query heads."""
    num_key_value_heads: int = 2
    """Number of key and value heads; the query heads must be a multiple of it."""
    head_dim: int | None = None
    """Width of a head, even; by default hidden_size / num_attention_heads."""
    rope_theta: float = 10_000.0
    """Base of the rotary position embedding."""
    rope_scaling: float = 1.0
    """Positions are divided by it before the rotary embedding (position interpolation); 1 leaves them as they are."""
    rms_norm_eps: float = 1e-6
    """Epsilon of every RMSNorm."""
    attention_bias: bool = False
    """Whether the projections of the attention, Δ included, have a bias (not: gates and compression of nsa, and what
    mla makes of its latent vectors)."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    qk_norm: bool = True
    """Whether an RMSNorm with learned scales is applied to each head of queries and keys (mla has none)."""
    backend: Backend = "auto"
    """Attention backend of dma, swa and nsa (mha, mla and a window that holds the whole sequence are PyTorch's
    own): auto (the fastest that can), triton (CUDA), flex (compiled FlexAttention; trains on CUDA only), torch (any
    device), or reference (O(N²), for tests)."""


class MixerCache(Protocol):
    """What a token mixer keeps of the tokens that it has read."""

    if TYPE_CHECKING:  # it may be computed

        @property
        def length(self) -> Tensor:
            """Positions read so far, int64 `[B]`."""

    else:  # a property would forbid a cache that inherits from this to set it
        length: Tensor

    def select(self, rows: Tensor) -> None:
        """Keep these sequences, in this order; a row may be named several times."""


Cache = TypeVar("Cache", bound=MixerCache)


class HeadShape(TypedDict):
    """What a model's configuration says of heads: the arguments of `GroupedQueryMixer`."""

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
    """Mixes the tokens of a sequence causally; all that a decoder knows of an attention.

    A subclass is made from a `ModelConfig`, and found by the name under which `MIXERS` holds it. For type checkers, it
    may say what its cache is: `class MyMixer(TokenMixer[MyCache])`.

    Attributes:
        auxiliary_parameters: names of those parameters, within the mixer, that only an auxiliary loss trains
            (`dma_lightning.auxiliary_losses`). Their gradients are clipped by a norm of their own, so that such a loss
            does not shorten the step of the others.
        undecayed_parameters: names of matrices, within the mixer, that weight decay leaves alone, as it does vectors.
        selection_parameters: names of the parameters, within the mixer, that decide which keys are kept.
        drawn_apart: names of linear maps, within the mixer, whose initial weights come from random numbers of their
            own. If no others are drawn besides those of another mixer, models of both start alike.
    """

    auxiliary_parameters: Sequence[str] = ()
    undecayed_parameters: Sequence[str] = ()
    selection_parameters: Sequence[str] = ()
    drawn_apart: Sequence[str] = ()

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
            config: the `ModelConfig`; a mixer of ours names the part of it that stands beside itself. What a subclass
                takes besides are the `attention_args` of the configuration.
        """

    @abstractmethod
    def forward(
        self,
        x: Tensor,
        packing: Packing | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Mix within each sequence, and with what its cache has read before.

        Args:
            x: `[B, N, C]`.
            packing: documents, of which each sees itself alone, and padding, which nobody sees.
            cache: of `new_cache`; x goes on where it ends, and is added to it. For inference.

        Returns:
            `[B, N, C]`.

        Raises:
            ValueError: on a wrong shape, dtype or device.
        """

    def place(self, layer: int, num_layers: int) -> None:
        """Become the mixer of a layer, by its number from 0, before weights are loaded; most are the same in all."""

    def begin_step(self, step: int) -> None:
        """Take note of the number of the optimizer step that the next forward passes are for; most need not know."""

    @abstractmethod
    def new_cache(self, batch: int, full: bool = False) -> Cache:
        """An empty cache for `batch` sequences on the module's device.

        Args:
            batch: B.
            full: keep every position, for comparison, also where fewer are enough.
        """

    @abstractmethod
    def mixing_flops(self, length: int) -> float:
        """FLOPs of a token's forward pass besides the products with weights, the mean over `length` positions.

        A multiplication and an addition are two.
        """

    @abstractmethod
    def cache_elements(self, length: int) -> int:
        """Numbers that the cache of a sequence holds after `length` positions."""

    def computed_by(self, device: torch.device, dtype: torch.dtype) -> str:
        """What computes the mixing of a whole sequence with such tensors and why, in words for a summary."""
        return "PyTorch"

    def unused_at(self, length: int) -> str | None:
        """Why sequences of this length do not train all of the mixer, or None if they do."""
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
        qk_norm: whether queries and keys are normalised.

    Raises:
        ValueError: if the sizes do not belong together.
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
                f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads} (of a model: "
                "num_attention_heads and num_key_value_heads)"
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
        """The arguments above of a model's configuration."""
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
        """Projected, and normalised, `[B, heads, N, D]`."""
        y = projection(x).unflatten(-1, (-1, self.head_dim))
        return (y if norm is None else normalised(y, norm)).transpose(1, 2)

    def queries_keys_values(self, x: Tensor, cache: MixerCache | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[B, H, N, D]` and keys `[B, G, N, D]` after QK-norm, if any, and rotation, and values; checks x."""
        check_mixer_input(x, self.q_proj.weight)
        positions = positions_of(x, cache)
        q = self.rotated(self.heads(x, self.q_proj, self.q_norm), positions)
        k = self.rotated(self.heads(x, self.k_proj, self.k_norm), positions)
        return q, k, self.heads(x, self.v_proj)

    def rotated(self, x: Tensor, positions: Tensor | None) -> Tensor:
        """`x` [B, heads, N, D] after the rotary embedding."""
        return apply_rope(x, self.rope_theta, positions, self.rope_scaling)


def merge_heads(x: Tensor) -> Tensor:
    """`[B, H, N, D] -> [B, N, H * D]`, as an output projection takes it."""
    return x.transpose(1, 2).flatten(2)


def packed(
    x: Tensor, packing: Packing | Tensor | None, documents: Tensor | None = None, padding: Tensor | None = None
) -> Packing | None:
    """The packing of x `[B, N, C]`, given as one, or as documents and padding `[B, N]`; None if there is none.

    Raises:
        ValueError: if documents or padding do not fit x, or come beside a packing.
    """
    if not isinstance(packing, Packing):
        documents = documents if packing is None else packing
        if x.ndim != 3 or not x.shape[-1]:  # which is told later
            return Packing.of(documents, padding)
        return Packing.of(documents, padding, batch=len(x), like=x[..., 0])
    if documents is not None or padding is not None:
        raise ValueError("expected documents and padding, or a packing, got both; a packing has them")
    return None if packing.documents is None and packing.padding is None else packing


def _packing(forward: Callable[..., Tensor], takes_tensors: bool) -> Callable[..., Tensor]:
    """A `forward` to which documents and padding may also come one by one, by name or as `(x, documents, padding)`."""

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


def normalised(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """`x` after a norm, in its own dtype; torch fuses a norm only where its weight has the dtype of `x`."""
    return norm(x.to(norm.weight.dtype)).to(x.dtype)


def positions_of(x: Tensor, cache: MixerCache | None) -> Tensor | None:
    """Positions of x `[B, N, C]`, int64 `[B, N]`; None if they are 0 … N-1.

    Raises:
        ValueError: if the cache is one of another number of sequences.
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
    """Raise `ValueError` unless x is `[B, N >= 1, C]` and fits the first weight `[..., C]`."""
    if x.ndim != 3 or x.shape[-1] != weight.shape[-1] or x.shape[1] == 0:
        raise ValueError(f"expected x [B, N >= 1, {weight.shape[-1]}], got {list(x.shape)}")
    if x.device != weight.device or (x.dtype != weight.dtype and not _autocasts(x)):
        raise ValueError(
            f"expected x {weight.dtype} on {weight.device} as the weights, got {x.dtype} on {x.device}; "
            "convert or move x or the module, or use autocast"
        )


def check_even(name: str, size: int) -> None:
    """Raise `ValueError` unless a size can be rotated."""
    if size < 2 or size % 2:
        raise ValueError(f"{name}: rotary embedding needs an even number >= 2, got {size}")


def mean_keys(length: int, window: int | None = None) -> float:
    """How many keys a query sees, on average over `length` positions, if it sees the last `window` or all."""
    window = length if window is None else min(window, length)
    return window - window * (window - 1) / (2 * length)


def _autocasts(x: Tensor) -> bool:
    """Whether a linear layer would convert `x` by itself."""
    device = x.device.type
    return x.is_floating_point() and device != "meta" and torch.is_autocast_enabled(device)
