"""Where `AtomicCheckpointIO` was before; code that imports it from here goes on working."""

from dma_lightning.checkpoints.io import AtomicCheckpointIO

__all__ = ["AtomicCheckpointIO"]
