"""Dynamic mask attention, from ranks to attention: its definition in plain PyTorch, and Triton kernels beside it.

The parts, in the order in which a key passes through them:

- `ranks`: ranks and biases of keys (`rank_kernels`: for Triton); `keep_rule`: how many of them a query keeps;
  `fixed_point`: ranks that drift, as integers; `packing`: documents and padding
- `lifetime_masks`: which queries see a key; `reference`: the O(N²) definition of it all
- `selection`: which keys live, and until when
- `segments`: from lifetimes to dense lists of keys
- `attention`: attention over these lists, forward and backward
- `decoding`: attention token by token, with an exact cache of constant size
- `context`: one sequence over several processes
- `selected_blocks`: the choice of blocks and the selected branch of native sparse attention

Shared by these parts:

- `checks`: checks of tensor arguments; `precision`: full precision inside autocast; `wide_biases`: biases in float64
- `primitives`: code that the kernels of several parts share, such as the running softmax
- `launching`: connects operations to their kernels; `tune`: finds the configurations for a GPU
- `drawing`: pictures of masks; `renamed`: old names, which keep working with a warning
"""

from dma_kernels.attention.ops import fused_attention
from dma_kernels.attention.torch_backend import segment_attention
from dma_kernels.decoding.dynamic_cache import DynamicMaskCache, KeyCache
from dma_kernels.decoding.full_cache import FullCache
from dma_kernels.decoding.state import NewKeys
from dma_kernels.keep_rule import KeepRule
from dma_kernels.lifetime_masks import Lifetimes
from dma_kernels.packing import Packing
from dma_kernels.ranks import ScoreForm, key_ranks, rank_bias
from dma_kernels.reference import reference_attention, reference_mask
from dma_kernels.renamed import giving_renamed
from dma_kernels.segments.slots import SegmentSlots

__all__ = [
    "DynamicMaskCache",
    "FullCache",
    "KeepRule",
    "KeyCache",
    "Lifetimes",
    "NewKeys",
    "Packing",
    "ScoreForm",
    "SegmentSlots",
    "fused_attention",
    "key_ranks",
    "rank_bias",
    "reference_attention",
    "reference_mask",
    "segment_attention",
]

__getattr__ = giving_renamed(__name__, SegmentLayout=SegmentSlots, key_scores=rank_bias)
