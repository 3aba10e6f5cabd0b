"""Masks for FlexAttention: exact block masks and mods from lifetimes, and attention with them. It needs only torch.

- `mods`: mask and score mods from lifetimes; `block_masks`: block masks, without visiting N x N pairs
  (`triton_block_tables`: the same on CUDA)
- `mask_attention`: attention with one block mask over the whole sequence
- `segment_plan`, `segment_attention`: attention over segments, O(N·w)

`SegmentPlan` is the old name of `FlexPlan`. It still works, with a FutureWarning. Its fields about slots are now in
`plan.slots`.
"""

from dma_flex.block_masks import block_mask, interval_block_mask
from dma_flex.mask_attention import flex_mask_attention
from dma_flex.mods import key_bias_score_mod, lifetime_mask_mod
from dma_flex.segment_attention import flex_segment_attention
from dma_flex.segment_plan import FlexPlan
from dma_kernels import Lifetimes
from dma_kernels.renamed import giving_renamed

__all__ = [
    "FlexPlan",
    "Lifetimes",
    "block_mask",
    "flex_mask_attention",
    "flex_segment_attention",
    "interval_block_mask",
    "key_bias_score_mod",
    "lifetime_mask_mod",
]

__getattr__ = giving_renamed(__name__, SegmentPlan=FlexPlan)
