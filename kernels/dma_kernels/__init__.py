"""Dynamic mask attention: its meaning in plain PyTorch, from ranks to attention, and Triton kernels beside it.

The rooms, in the order in which a key passes through them:

- `scores`: ranks and scores of keys; `lifetimes`: which queries see a key; `reference`: the O(N²) definition of it all
- `selection`: which keys live, and until when
- `segments`: from lifetimes to dense lists of keys
- `attention`: attention over these lists, forward and backward
- `decoding`: attention token by token, with an exact cache of constant size
- `selected_blocks`: the selected branch of native sparse attention
- `primitives`: what kernels of several rooms compute in the same way, such as the running softmax
- `launching`: how operations come to their kernels
- `checks`: what all of them expect of their tensors; `tune`: configurations for a GPU; `drawing`: pictures of masks
"""

from dma_kernels.attention.ops import fused_attention
from dma_kernels.attention.plain import segment_attention
from dma_kernels.decoding.dynamic_cache import DynamicMaskCache, KeyCache
from dma_kernels.decoding.full_cache import FullCache
from dma_kernels.lifetimes import Lifetimes
from dma_kernels.reference import reference_attention, reference_mask
from dma_kernels.scores import ScoreForm, key_ranks, key_scores
from dma_kernels.segments.plain import SegmentLayout
from dma_kernels.segments.slots import SegmentSlots

__all__ = [
    "DynamicMaskCache",
    "FullCache",
    "KeyCache",
    "Lifetimes",
    "ScoreForm",
    "SegmentLayout",
    "SegmentSlots",
    "fused_attention",
    "key_ranks",
    "key_scores",
    "reference_attention",
    "reference_mask",
    "segment_attention",
]
