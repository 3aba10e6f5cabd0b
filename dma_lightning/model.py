"""The Doge decoder around dynamic mask attention.

B batch, N length, C hidden size, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from typing import Any, cast
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dma_kernels import Packing
from dma_kernels.context import ContextGroup
from dma_lightning.config import ModelConfig
from dma_lightning.data.base import Batch
from dma_lightning.generation import generate
from dma_lightning.losses import Loss, TokenScores, chunked_scores, token_losses
from dma_lightning.mixers import MIXERS, MixerCache, TokenMixer
from dma_lightning.sampling import Sampling
from dma_lightning.vocabularies import check_tokens


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
    """Attention and feed-forward network, each after a norm, added to a residual with learned weights per channel."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.input_residual = nn.Parameter(torch.ones(config.hidden_size))
        self.self_attn = MIXERS[config.attention].from_config(config, **config.attention_args)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_residual = nn.Parameter(torch.ones(config.hidden_size))
        self.mlp = DogeMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        x: Tensor,
        packing: Packing | None = None,
        cache: MixerCache | None = None,
    ) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), packing, cache=cache)
        x = self.input_residual * x + self.dropout(attended)
        return self.post_attention_residual * x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class DogeForCausalLM(nn.Module):
    """The Doge decoder without experts, around any of the token mixers.

    With dynamic mask attention, parameters have the names of Hugging Face's `DogeForCausalLM`, without `model.`.

    Source: arXiv 2508.02124v6; block structure as in Hugging Face Transformers, `models/doge`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.context: ContextGroup | None = None
        self.activation_checkpointing = False
        """Whether layers compute activations again in the backward pass instead of keeping them."""
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DogeLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._init_weights()
        for layer, mixer in enumerate(self.mixers):
            mixer.place(layer, config.num_hidden_layers)
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
            documents: integer document ids `[B, N]`; a document is a run of equal ids and sees only itself.
            padding: bool `[B, N]`, True at padded positions.
            cache: from `new_cache`, one for each layer; the tokens continue it and are added to it.
            last_only: only the logits of the last position, `[B, 1, V]`.

        Returns:
            `[B, N, V]`.

        Raises:
            ValueError: on a wrong shape, dtype or device, or a sequence that is too long. On a CPU, also on a token
                that is not below `vocab_size`; other devices would report it too late.
        """
        x = self._last_layer(input_ids, documents, padding, cache)
        return self.lm_head(self.norm(x[:, -1:] if last_only else x))

    def scores(self, batch: Batch, chunk: int, predict: bool = False, loss: Loss = token_losses) -> TokenScores:
        """Losses and likeliest tokens of a batch, from the logits of one chunk of tokens at a time.

        See `forward` for inputs and errors, and `chunked_scores` for the other arguments.
        """
        x = self._last_layer(batch["input_ids"], batch.get("documents"), batch.get("padding"))
        return chunked_scores(self.lm_head, self.norm(x), batch["labels"], chunk, predict, loss)

    def _last_layer(
        self,
        input_ids: Tensor,
        documents: Tensor | None,
        padding: Tensor | None,
        cache: Sequence[MixerCache] | None = None,
    ) -> Tensor:
        """The output of the last layer, `[B, N, C]`; arguments and errors are those of `forward`."""
        longest = self.config.max_position_embeddings
        if input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids: expected integers [B, N], got {input_ids.dtype} {list(input_ids.shape)}")
        if input_ids.device != self.embed_tokens.weight.device:
            raise ValueError(
                f"input_ids: expected on {self.embed_tokens.weight.device} as the model, got {input_ids.device}; "
                "move one of them"
            )
        context = self.context if cache is None else None
        if cache is None and input_ids.shape[1] > (allowed := -(-longest // self.parts)):
            parts = "" if context is None else f" in {self.parts} parts, {allowed} in each"
            raise ValueError(
                f"input_ids: expected at most max_position_embeddings = {longest} tokens{parts}, got "
                f"{input_ids.shape[1]}; shorten the sequence or raise max_position_embeddings"
            )
        if cache is not None and len(cache) != len(self.layers):
            raise ValueError(f"cache: expected one for each of the {len(self.layers)} layers, got {len(cache)}")
        packing = Packing.of(documents, padding, batch=len(input_ids), like=input_ids)
        if context is not None:
            packing = context.pack(documents, padding)
        caches: Sequence[MixerCache | None] = cache or [None] * len(self.layers)
        x = self._embed(input_ids)  # [B, N, C]
        for layer, layer_cache in zip(self.layers, caches, strict=True):
            if self.activation_checkpointing and torch.is_grad_enabled() and cache is None:
                x = checkpoint(layer, x, packing, use_reentrant=False)
            else:
                x = layer(x, packing, layer_cache)
        return x

    def join_context(self, context: ContextGroup | None) -> None:
        """Divide sequences among the processes of a group, one part for each; None: whole sequences.

        Without a cache, `forward` then takes and returns only this process's part of each tensor, as from
        `ContextGroup.part`. All parts together have up to `max_position_embeddings` tokens. All processes of the group
        call it together. The sum of their gradients is the gradient that a single process would compute.

        Raises:
            ValueError: if the attention does not support this (`mha`, `mla`, `nsa`).
        """
        for mixer in self.mixers:
            mixer.join_context(context)
        self.context = context

    def _embed(self, input_ids: Tensor) -> Tensor:
        try:
            return self.embed_tokens(input_ids)
        except IndexError:  # only on a CPU; checking first would wait for other devices
            check_tokens("input_ids", input_ids, self.vocab_size)
            raise

    def new_cache(self, batch: int, full: bool = False) -> list[MixerCache]:
        """Empty caches of all layers; see `TokenMixer.new_cache` for the arguments."""
        return [mixer.new_cache(batch, full) for mixer in self.mixers]

    def generate(
        self, input_ids: Tensor, max_new_tokens: int, sampling: Sampling | None = None, **options: Any
    ) -> Tensor:
        """Continue prompts `[B, N]`, int64 `[B, at most max_new_tokens]`; see `stream_tokens` for the options.

        The default `eos_token_id` is that of the configuration.
        """
        options.setdefault("eos_token_id", self.config.eos_token_id)
        return generate(self, input_ids, max_new_tokens, sampling, **options)

    @property
    def parts(self) -> int:
        """Number of parts into which sequences are divided, one for each process; see `join_context`."""
        return 1 if self.context is None else self.context.size

    @property
    def vocab_size(self) -> int:
        """V, number of different tokens."""
        return self.config.vocab_size

    @property
    def mixers(self) -> list[TokenMixer]:
        """The mixers of the layers, from the first to the last."""
        layers = cast("Iterable[DogeLayer]", self.layers)  # the type of a ModuleList does not name its modules
        return [layer.self_attn for layer in layers]

    @property
    def num_parameters(self) -> int:
        """Number of trainable values; tied embeddings count once."""
        return sum(p.numel() for p in self.parameters())

    @property
    def num_non_embedding_parameters(self) -> int:
        """Number of trainable values outside the embedding and the output head."""
        tables = {id(p): p.numel() for p in (self.embed_tokens.weight, self.lm_head.weight)}
        return self.num_parameters - sum(tables.values())

    @property
    def flops_per_token(self) -> float:
        """`training_flops` for sequences of `max_position_embeddings` tokens."""
        return self.training_flops(self.config.max_position_embeddings)

    def training_flops(self, length: int) -> float:
        """FLOPs to train on one token (forward and backward) in sequences of this length.

        Counts matrix products only: 6 per weight, and three times the mixers' forward FLOPs.
        """
        mixing = sum(mixer.mixing_flops(length) for mixer in self.mixers)
        return 6 * (self.num_non_embedding_parameters + self.lm_head.weight.numel()) + 3 * mixing

    @torch.no_grad()
    def _init_weights(self) -> None:
        apart = torch.Generator().manual_seed(crc32(torch.get_rng_state().numpy().tobytes()))
        drawn_apart = {mixer.get_submodule(name) for mixer in self.mixers for name in mixer.drawn_apart}
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                if module in drawn_apart:
                    module.weight.copy_(torch.randn(module.weight.shape, generator=apart, device="cpu"))
                    module.weight.mul_(self.config.initializer_range)
                else:
                    nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)


def decoder_of(module: nn.Module) -> DogeForCausalLM:
    """The decoder of a `LanguageModel`, for callbacks."""
    return cast("DogeForCausalLM", module.model)  # Lightning's hooks accept modules of any kind
