"""Callbacks that act on a run; those that only watch it are in `dma_lightning.monitoring`.

- `gradient_guard`: ends a run at steps that would ruin it, or leaves them out
- `fit_report`: how far a run came, and where its checkpoint and logs are
- `mixed_windows`: trains with all keys now and then, so that far ones have a gradient
- `continuations`: what the model makes of the beginnings of sequences, as `predict` writes it

Checkpoints are written by `dma_lightning.checkpoints.ResumableCheckpoint`.
"""

from dma_lightning.callbacks.continuations import ContinuationWriter
from dma_lightning.callbacks.fit_report import FitReport
from dma_lightning.callbacks.gradient_guard import GradientGuard, UnstableTrainingError
from dma_lightning.callbacks.mixed_windows import MixedWindows

__all__ = ["ContinuationWriter", "FitReport", "GradientGuard", "MixedWindows", "UnstableTrainingError"]
