"""Dynamic mask attention in decoders of Hugging Face Transformers, which the extra `transformers` installs.

Importing this package registers the attention implementation `dma`, and the model type `dma_lightning` of exports.
docs/transformers.md shows how to use both.

- `conversion`: adds dynamic masks to a model, and loads such models
- `layers`: the modules that attention layers get
- `attention`: the attention function
- `masks`: finds documents and padding in the masks of Transformers
- `cache`: a cache of constant size for `generate`
- `own_model`: our decoder as a Transformers model
"""

try:
    from dma_lightning.transformers.cache import DynamicMasksCache
    from dma_lightning.transformers.conversion import add_dynamic_masks, load_with_dynamic_masks, register
    from dma_lightning.transformers.own_model import DmaLightningConfig, DmaLightningForCausalLM, register_own_model
except ImportError as error:
    if (error.name or "").split(".")[0] != "transformers":
        raise
    raise ValueError(
        "dma_lightning.transformers: expected the package transformers, version 5.18 or newer, got none or an older "
        "one; install dma-lightning[transformers]"
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
