"""Dynamic mask attention in decoders of Hugging Face Transformers, which the extra `transformers` installs.

Importing this registers the attention implementation `dma`; docs/transformers.md shows how a model trains and generates
with it.
"""

try:
    from dma_lightning.transformers.cache import DynamicMasksCache
    from dma_lightning.transformers.conversion import add_dynamic_masks, load_with_dynamic_masks, register
except ImportError as error:
    if (error.name or "").split(".")[0] != "transformers":
        raise
    raise ValueError(
        "dma_lightning.transformers: expected the package transformers, at least 5.18, got none or an older one; "
        "install dma-lightning[transformers]"
    ) from error

__all__ = ["DynamicMasksCache", "add_dynamic_masks", "load_with_dynamic_masks"]

register()
