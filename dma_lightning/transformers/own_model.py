"""Our decoder as a Transformers model, for models that Doge cannot express.

B batch, N length, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import find_packed_sequence_indices
from transformers.modeling_outputs import CausalLMOutputWithPast

from dma_lightning.config import ModelConfig
from dma_lightning.files.reading import as_kind
from dma_lightning.huggingface.own import MODEL_TYPE
from dma_lightning.mixers import MIXERS, MixerCache
from dma_lightning.model import DogeForCausalLM


class DmaLightningConfig(PreTrainedConfig):
    """`config.json` of a model that `save_for_transformers` wrote; `shape` is its `ModelConfig`."""

    model_type = MODEL_TYPE

    shape: dict[str, Any] | None = None
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        config = self.model_config()
        self.vocab_size, self.hidden_size = config.vocab_size, config.hidden_size
        self.num_hidden_layers, self.num_attention_heads = config.num_hidden_layers, config.num_attention_heads
        self.max_position_embeddings = config.max_position_embeddings

    def model_config(self) -> ModelConfig:
        """Convert `shape` to a `ModelConfig`.

        Raises:
            ValueError: if a field is unknown or has the wrong type.
        """
        shape, types = self.shape or {}, get_type_hints(ModelConfig)
        if unknown := sorted(shape.keys() - types.keys()):
            raise ValueError(
                f"config.json: shape: expected fields that this version knows, got {unknown}; update dma-lightning"
            )
        return ModelConfig(**{name: as_kind(x, types[name], f"config.json: shape.{name}") for name, x in shape.items()})


class DecoderCache(Cache):
    """The caches of all layers of our decoder, for any token mixer."""

    def __init__(self, layers: Sequence[MixerCache]) -> None:
        super().__init__(layers=[])
        self.caches, self.read = layers, 0

    is_croppable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions read so far, including padding."""
        return self.read

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        for cache in self.caches:
            cache.select(indices)

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("expected a cache that only grows, but crop was called; generate without an assistant")


class DmaLightningForCausalLM(PreTrainedModel, GenerationMixin):
    """Our decoder with any token mixer, for `AutoModelForCausalLM`. It creates its own caches."""

    config_class = DmaLightningConfig
    supports_gradient_checkpointing = True
    _is_stateful = True  # no assisted generation: wrong guesses cannot be removed
    _tied_weights_keys = {"decoder.lm_head.weight": "decoder.embed_tokens.weight"}  # noqa: RUF012  # Transformers'

    def __init__(self, config: DmaLightningConfig) -> None:
        super().__init__(config)
        self.gradient_checkpointing = False  # Transformers sets it
        self.decoder = DogeForCausalLM(config.model_config())
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> Any:
        """Load a model from a folder, with the arguments of Transformers.

        Raises:
            ValueError: if weights are missing, or `config.json` is from another version.
        """
        tells = options.pop("output_loading_info", False)
        options.pop("use_safetensors", None)  # it reads no other format
        loaded: Any = super().from_pretrained(*args, use_safetensors=True, output_loading_info=True, **options)
        model, told = loaded
        if missing := sorted(told["missing_keys"]):
            raise ValueError(f"expected all weights of the model, but {missing[:5]} are missing")
        model._set_constants()
        return (model, told) if tells else model

    @torch.no_grad()
    def _set_constants(self) -> None:
        """Set the unsaved buffers, which Transformers allocates but does not fill."""
        config = self.decoder.config
        for number, mixer in enumerate(self.decoder.mixers):
            fresh = MIXERS[config.attention].from_config(config, **config.attention_args)
            fresh.place(number, config.num_hidden_layers)
            for name, x in fresh.named_buffers():
                mixer.get_buffer(name).copy_(x)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DecoderCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Logits `[B, N, V]` of the next tokens.

        Args:
            input_ids: `[B, N]`.
            attention_mask: `[B, positions read so far]`, 0 at padding.
            position_ids: `[B, N]`; without a mask or a cache, a document starts where they are not consecutive. They do
                not change the rotation, which depends only on distances.
            past_key_values: the cache of the tokens read so far.
            labels: `[B, N]`, -100 for none.
            use_cache: whether to create a cache, for inference. Default: no.
            options: `logits_to_keep`, and options of the loss.
        """
        cache, (batch, length) = past_key_values, input_ids.shape
        if use_cache and cache is None:
            cache = DecoderCache(self.decoder.new_cache(batch))
        documents = padding = None
        if attention_mask is not None:
            padding = attention_mask[:, -length:] == 0
        elif position_ids is not None and cache is None:
            documents = find_packed_sequence_indices(position_ids.expand(batch, -1))
        self.decoder.activation_checkpointing = self.gradient_checkpointing and self.training
        keep = options.pop("logits_to_keep", 0)
        caches = None if cache is None else cache.caches
        logits = self.decoder(input_ids, documents, padding, caches, last_only=isinstance(keep, int) and keep == 1)
        if cache is not None:
            cache.read += length
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.decoder.vocab_size, **options)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: the decoder has initialized its weights."""

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder.lm_head


def register_own_model() -> None:
    """Register our model with the Auto classes of Transformers."""
    AutoConfig.register(MODEL_TYPE, DmaLightningConfig, exist_ok=True)
    AutoModelForCausalLM.register(DmaLightningConfig, DmaLightningForCausalLM, exist_ok=True)
