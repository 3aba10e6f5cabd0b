"""Dynamic mask attention: its meaning in plain PyTorch, from ranks to attention, and Triton kernels beside it."""

from dma_kernels.full_cache import FullCache
from dma_kernels.fused_attention import fused_attention
from dma_kernels.key_cache import DynamicMaskCache, KeyCache
from dma_kernels.lifetimes import Lifetimes
from dma_kernels.reference import reference_attention, reference_mask
from dma_kernels.scores import ScoreForm, key_ranks, key_scores
from dma_kernels.segment_attention import segment_attention
from dma_kernels.segment_slots import SegmentSlots
from dma_kernels.segments import SegmentLayout

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
