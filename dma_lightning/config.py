"""The configuration of a decoder: the fields of each mixer, and the decoder's own."""

import inspect
from dataclasses import dataclass, field

from dma_lightning.closest import did_you_mean
from dma_lightning.mixers import MIXERS
from dma_lightning.mixers.dynamic_mask import DynamicMaskConfig
from dma_lightning.mixers.latent import LatentConfig
from dma_lightning.mixers.native_sparse import NativeSparseConfig
from dma_lightning.mixers.softmax import SlidingWindowConfig

Scalar = bool | int | float | str | None


@dataclass(frozen=True, kw_only=True)
class ModelConfig(NativeSparseConfig, LatentConfig, SlidingWindowConfig, DynamicMaskConfig):
    """Shape of a Doge decoder, including its attention; the defaults are the tiny model that trains on a CPU."""

    vocab_size: int = 256
    """Number of different tokens."""
    max_position_embeddings: int = 256
    """Longest sequence that the model takes at once, in tokens; generation can go beyond it."""
    intermediate_size: int = 384
    """Width of the SwiGLU feed-forward network."""
    num_hidden_layers: int = 4
    """Number of decoder layers."""
    attention: str = "dma"
    """What mixes the tokens in every layer: dma (dynamic mask attention), mha (the whole past), swa (a sliding
    window), mla (latent attention), nsa (native sparse attention), or another name in `dma_lightning.mixers.MIXERS`."""
    attention_args: dict[str, Scalar | list[Scalar]] = field(default_factory=dict, hash=False)
    """Further arguments of the attention, by name; the attentions of this package take none."""
    mlp_bias: bool = False
    """Whether the projections of the feed-forward network have a bias."""
    hidden_dropout: float = 0.0
    """Dropout on the output of each attention and feed-forward network."""
    tie_word_embeddings: bool = True
    """Also use the embedding matrix as the output head."""
    bos_token_id: int | None = None
    """Token that texts begin with, if any; only Hugging Face uses it, nothing here inserts it."""
    eos_token_id: int | list[int] | None = None
    """Token or tokens that end a text of `DogeForCausalLM.generate` or `dma-lightning generate`, if any."""

    def __post_init__(self) -> None:
        if self.attention not in MIXERS:
            meant = did_you_mean(self.attention, MIXERS)
            raise ValueError(f"attention: expected one of {list(MIXERS)}, got {self.attention!r}{meant}")
        try:
            inspect.signature(MIXERS[self.attention].from_config).bind(self, **self.attention_args)
        except TypeError as error:
            raise ValueError(
                f"attention_args: expected what attention {self.attention!r} takes, got {self.attention_args}: {error}"
            ) from error
        for name in ("vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size", "num_hidden_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("rope_theta", "rope_scaling", "rms_norm_eps", "initializer_range"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")
        if not 0 <= self.hidden_dropout < 1:
            raise ValueError(f"hidden_dropout: expected 0 <= p < 1, got {self.hidden_dropout}")
