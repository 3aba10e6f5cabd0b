"""The Doge decoder around dynamic mask attention.

B batch, N length, C hidden size, V vocabulary.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dma_kernels import ScoreForm
from dma_lightning.backends import Backend
from dma_lightning.generation import generate
from dma_lightning.mixers import MIXERS, MixerCache
from dma_lightning.sampling import Sampling

Scalar = bool | int | float | str | None


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a Doge decoder; the defaults are the tiny model that trains on a CPU."""

    vocab_size: int = 256
    """Number of different tokens."""
    max_position_embeddings: int = 256
    """Longest sequence that the model takes at once, in tokens; generation goes on beyond it."""
    hidden_size: int = 128
    """Width of the residual stream."""
    intermediate_size: int = 384
    """Width of the SwiGLU feed-forward network."""
    num_hidden_layers: int = 4
    """Number of decoder layers."""
    num_attention_heads: int = 4
    """Number of query heads."""
    num_key_value_heads: int = 2
    """Number of key and value heads; the query heads must be a multiple of it."""
    head_dim: int | None = None
    """Width of a head, even; by default hidden_size / num_attention_heads."""
    attention: str = "dma"
    """What mixes the tokens in every layer: dma (dynamic mask attention), mha (all of the past), swa (a sliding
    window), mla (latent attention), nsa (native sparse attention), or another name in `dma_lightning.mixers.MIXERS`."""
    keep_window_size: int = 64
    """dma: number of best-scored past keys that a query attends to."""
    keep_last: int = 0
    """dma: number of last positions that stay visible besides, whatever their score."""
    sinks: int = 0
    """dma: number of first keys of each document that stay visible besides."""
    score_form: ScoreForm = "exp"
    """dma: bias that a key's rank adds to its logits: exp(rank), or the rank itself (linear). exp overflows above a
    rank of 88.7, which shows as a loss of NaN."""
    sliding_window: int = 64
    """swa: number of last positions that a query attends to, its own included."""
    kv_lora_rank: int = 32
    """mla: numbers of the latent vector of a token."""
    qk_rope_head_dim: int = 16
    """mla: channels of a query and key that are rotated, even."""
    qk_nope_head_dim: int = 16
    """mla: channels of a query and key that are not rotated."""
    v_head_dim: int = 32
    """mla: channels of a value."""
    nsa_compress_block: int = 16
    """nsa: tokens of a compressed block."""
    nsa_compress_stride: int = 8
    """nsa: tokens from one compressed block to the next; both kinds of blocks are multiples of it."""
    nsa_compress_hidden: int = 32
    """nsa: hidden width of the network that compresses a block."""
    nsa_select_block: int = 16
    """nsa: tokens of a block that is selected as a whole."""
    nsa_select_count: int = 4
    """nsa: number of blocks that a query attends to: the first, its own, the one before, and the best of the others."""
    nsa_window: int = 32
    """nsa: number of last positions that a query attends to besides, its own included."""
    nsa_separate_kv: bool = True
    """nsa: whether each of the three branches has keys and values of its own."""
    attention_args: dict[str, Scalar | list[Scalar]] = field(default_factory=dict, hash=False)
    """What the attention takes besides, by name; those that are here take nothing."""
    rope_theta: float = 10_000.0
    """Base of the rotary position embedding."""
    rope_scaling: float = 1.0
    """Positions are divided by it before the rotary embedding (position interpolation); 1 leaves them as they are."""
    rms_norm_eps: float = 1e-6
    """Epsilon of every RMSNorm."""
    attention_bias: bool = False
    """Whether the projections of the attention, Δ included, have a bias (not: gates and compression of nsa, and what
    mla makes of its latent vectors)."""
    mlp_bias: bool = False
    """Whether the projections of the feed-forward network have a bias."""
    hidden_dropout: float = 0.0
    """Dropout on the output of each attention and feed-forward network."""
    tie_word_embeddings: bool = True
    """Use the embedding matrix as output head too."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    bos_token_id: int | None = None
    """Token with which texts begin, if they do; for Hugging Face, nothing here puts it there."""
    eos_token_id: int | list[int] | None = None
    """Token or tokens with which a text of `DogeForCausalLM.generate` or `dma-lightning generate` ends, if any."""
    backend: Backend = "auto"
    """Attention backend of dma, swa and nsa (mha, mla and a window that holds the whole sequence are PyTorch's
    own): auto (the fastest that can), triton (CUDA), flex (compiled FlexAttention; trains on CUDA only), torch (any
    device), or reference (O(N²), for tests)."""

    def __post_init__(self) -> None:
        if self.attention not in MIXERS:
            raise ValueError(f"attention: expected one of {list(MIXERS)}, got {self.attention!r}")
        try:
            inspect.signature(MIXERS[self.attention].of_config).bind(self, **self.attention_args)
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


class DogeMLP(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DogeLayer(nn.Module):
    """Attention and feed-forward network, each behind a norm and beside a learned residual weight per channel."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.input_residual = nn.Parameter(torch.ones(config.hidden_size))
        self.self_attn = MIXERS[config.attention].of_config(config, **config.attention_args)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_residual = nn.Parameter(torch.ones(config.hidden_size))
        self.mlp = DogeMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        x: Tensor,
        documents: Tensor | None = None,
        padding: Tensor | None = None,
        cache: MixerCache | None = None,
    ) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), documents, padding, cache)
        x = self.input_residual * x + self.dropout(attended)
        return self.post_attention_residual * x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class DogeForCausalLM(nn.Module):
    """The Doge decoder without experts, around any of the token mixers.

    With dynamic mask attention, parameter names are those of Hugging Face's `DogeForCausalLM`, less `model.`.

    Source: arXiv 2508.02124v6; block structure as in Hugging Face Transformers, `models/doge`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        """Whether layers keep no activations for the backward pass, but compute them again."""
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DogeLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.apply(self._init_weights)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        documents: Tensor | None = None,
        padding: Tensor | None = None,
        cache: Sequence[MixerCache] | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits of the next token at every position.

        Args:
            input_ids: int64 `[B, N]`, N at most `max_position_embeddings` without a cache.
            documents: integer document ids `[B, N]`, see `TokenMixer.forward`.
            padding: bool `[B, N]`, True at padded positions.
            cache: of `new_cache`, one for each layer; the tokens go on where it ends, and are added to it.
            last_only: only the logits of the last position, `[B, 1, V]`.

        Returns:
            `[B, N, V]`.

        Raises:
            ValueError: on a wrong shape, dtype or device, or a sequence that is too long.
        """
        longest = self.config.max_position_embeddings
        if input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids: expected integers [B, N], got {input_ids.dtype} {list(input_ids.shape)}")
        if input_ids.device != self.embed_tokens.weight.device:
            raise ValueError(
                f"input_ids: expected on {self.embed_tokens.weight.device} as the model, got {input_ids.device}; "
                "move one of them"
            )
        if cache is None and input_ids.shape[1] > longest:
            raise ValueError(
                f"input_ids: expected at most max_position_embeddings = {longest} tokens, got {input_ids.shape[1]}; "
                "shorten the sequence or raise max_position_embeddings"
            )
        if cache is not None and len(cache) != len(self.layers):
            raise ValueError(f"cache: expected one for each of the {len(self.layers)} layers, got {len(cache)}")
        x = self.embed_tokens(input_ids)  # [B, N, C]
        for layer, layer_cache in zip(self.layers, cache or [None] * len(self.layers), strict=True):
            if self.activation_checkpointing and torch.is_grad_enabled() and cache is None:
                x = checkpoint(layer, x, documents, padding, use_reentrant=False)
            else:
                x = layer(x, documents, padding, layer_cache)
        return self.lm_head(self.norm(x[:, -1:] if last_only else x))

    def new_cache(self, batch: int, full: bool = False) -> list[MixerCache]:
        """Empty caches of all layers; arguments as `TokenMixer.new_cache`."""
        return [layer.self_attn.new_cache(batch, full) for layer in self.layers]

    def generate(
        self, input_ids: Tensor, max_new_tokens: int, sampling: Sampling | None = None, **options: Any
    ) -> Tensor:
        """Go on with prompts `[B, N]`, int64 `[B, at most max_new_tokens]`; see `stream_tokens` for the options.

        `eos_token_id` is by default that of the configuration.
        """
        options.setdefault("eos_token_id", self.config.eos_token_id)
        return generate(self, input_ids, max_new_tokens, sampling, **options)

    @property
    def num_parameters(self) -> int:
        """All trainable numbers; tied embeddings count once."""
        return sum(p.numel() for p in self.parameters())

    @property
    def num_non_embedding_parameters(self) -> int:
        """Trainable numbers outside the embedding and the output head."""
        tables = {id(p): p.numel() for p in (self.embed_tokens.weight, self.lm_head.weight)}
        return self.num_parameters - sum(tables.values())

    @property
    def flops_per_token(self) -> float:
        """`training_flops` in sequences of `max_position_embeddings` tokens."""
        return self.training_flops(self.config.max_position_embeddings)

    def training_flops(self, length: int) -> float:
        """FLOPs to train on one token (forward and backward) in sequences of so many tokens.

        Matrix products only: 6 per weight, and three times what the mixers count for a forward pass.
        """
        mixing = sum(layer.self_attn.mixing_flops(length) for layer in self.layers)
        return 6 * (self.num_non_embedding_parameters + self.lm_head.weight.numel()) + 3 * mixing

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
