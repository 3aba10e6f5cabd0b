"""Dynamic mask attention in decoders of Hugging Face Transformers, which the extra `transformers` installs.

Importing this registers the attention implementation `dma`, and the model type `dma_lightning` of exports;
docs/transformers.md shows how both are used.

- `conversion`: masks for a model; `layers`: what its layers get
- `attention`: what they compute; `masks`: what they are told of documents and padding; `cache`: what they keep
- `own_model`: our decoder as a model of Transformers
"""

try:
    from dma_lightning.transformers.cache import DynamicMasksCache
    from dma_lightning.transformers.conversion import add_dynamic_masks, load_with_dynamic_masks, register
    from dma_lightning.transformers.own_model import DmaLightningConfig, DmaLightningForCausalLM, register_own_model
except ImportError as error:
    if (error.name or "").split(".")[0] != "transformers":
        raise
    raise ValueError(
        "dma_lightning.transformers: expected the package transformers, at least 5.18, got none or an older one; "
        "install dma-lightning[transformers]"
    ) from error

__all__ = [
    "DmaLightningConfig",
    "DmaLightningForCausalLM",
    "DynamicMasksCache",
    "add_dynamic_masks",
    "load_with_dynamic_masks",
]

register()
register_own_model()
