"""The token mixers by name: the choices for `attention:` in a model's configuration.

- `base`: the interface of a mixer, and what all mixers with query and KV heads share
- `dynamic_mask`, `softmax` (the whole past, or a window), `latent`, `native_sparse`: one mixer per file, with the
  settings that it reads
- `drift`, `drifting_ranks`: ranks and biases that fall behind with age; `far_content`: two biases per key
- `sdpa`: attention with a given mask by PyTorch's own kernels; `position_cache`: a cache of positions
- `retention`: a loss that trains ranks to predict attention; `part_retention`: the same for sequences that several
  processes divide
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
