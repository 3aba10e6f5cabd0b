"""The mask layer offers the mask algebra of the layer below."""

import dma_flex
import dma_kernels


def test_lifetime_masks_are_the_same_class() -> None:
    assert dma_flex.Lifetimes is dma_kernels.Lifetimes
