"""Masks for FlexAttention: exact block masks and mods of lifetimes, and attention over them. Needs torch only.

- `mods`: mask and score mods of lifetimes; `block_masks`: their block masks, without looking at N x N
  (`triton_block_tables`: on CUDA)
- `mask_attention`: attention under one block mask of the whole sequence
- `segment_plan`, `segment_attention`: attention over segments, O(N·w)

`SegmentPlan`, the old name of `FlexPlan`, gives it with a FutureWarning; what it held of the slots is in `plan.slots`.
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
