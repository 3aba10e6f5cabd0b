"""The token mixers by name: everything that `attention:` of a model's configuration can say."""

from dma_lightning.mixers.base import MixerCache, TokenMixer
from dma_lightning.mixers.dynamic_mask import DynamicMaskAttention
from dma_lightning.mixers.latent import LatentAttention
from dma_lightning.mixers.native_sparse import NativeSparseAttention
from dma_lightning.mixers.softmax import MultiHeadAttention, SlidingWindowAttention

MIXERS: dict[str, type[TokenMixer]] = {
    "dma": DynamicMaskAttention,
    "mha": MultiHeadAttention,
    "swa": SlidingWindowAttention,
    "mla": LatentAttention,
    "nsa": NativeSparseAttention,
}

__all__ = [
    "MIXERS",
    "DynamicMaskAttention",
    "LatentAttention",
    "MixerCache",
    "MultiHeadAttention",
    "NativeSparseAttention",
    "SlidingWindowAttention",
    "TokenMixer",
]
