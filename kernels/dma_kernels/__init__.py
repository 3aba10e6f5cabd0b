"""The meaning of dynamic mask attention in plain PyTorch: ranks, selection, lifetimes, segments, attention."""

from dma_kernels.lifetimes import Lifetimes
from dma_kernels.reference import reference_attention, reference_mask
from dma_kernels.scores import ScoreForm, key_ranks, key_scores
from dma_kernels.segment_attention import segment_attention
from dma_kernels.segments import SegmentLayout

__all__ = [
    "Lifetimes",
    "ScoreForm",
    "SegmentLayout",
    "key_ranks",
    "key_scores",
    "reference_attention",
    "reference_mask",
    "segment_attention",
]
