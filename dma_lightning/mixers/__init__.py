"""The token mixers by name: everything that `attention:` of a model's configuration can say.

- `base`: what a decoder asks of a mixer, and what those with heads share
- `dynamic_mask`, `softmax` (all of the past, or a window), `latent`, `native_sparse`: one mixer a file, behind what it
  takes of a configuration
- `sdpa`: attention by PyTorch's own kernels under a given mask; `position_cache`: a cache of positions
- `retention`: a loss that trains ranks to foresee attention
- `native_sparse_blocks`: the blocks of native sparse attention
"""

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
