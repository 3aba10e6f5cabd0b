"""The former place of `GradientGuard`; configurations that name it here still work."""

from dma_lightning.callbacks.gradient_guard import GradientGuard, UnstableTrainingError

__all__ = ["GradientGuard", "UnstableTrainingError"]
