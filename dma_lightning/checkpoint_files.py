"""The former place of `AtomicCheckpointIO`; code that imports it from here still works."""

from dma_lightning.checkpoints.io import AtomicCheckpointIO

__all__ = ["AtomicCheckpointIO"]
