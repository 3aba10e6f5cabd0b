"""Masks for FlexAttention. Needs torch only; so far the mask algebra of the layer below."""

from dma_kernels import Lifetimes

__all__ = ["Lifetimes"]
