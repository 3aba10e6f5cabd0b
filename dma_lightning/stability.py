"""Where `GradientGuard` was before; configurations that name it here go on working."""

from dma_lightning.callbacks.gradient_guard import GradientGuard, UnstableTrainingError

__all__ = ["GradientGuard", "UnstableTrainingError"]
