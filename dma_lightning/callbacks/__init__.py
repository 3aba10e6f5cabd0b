"""Callbacks that act on a run; those that only watch it are in `dma_lightning.monitoring`.

- `gradient_guard`: stops a run at steps that would ruin it, or skips them
- `fit_report`: how far a run came, and where its checkpoint and logs are
- `mixed_windows`: sometimes trains with all keys, so that far keys get a gradient
- `continuations`: continues the beginnings of sequences, for `predict`

`dma_lightning.checkpoints.ResumableCheckpoint` writes the checkpoints.
"""

from dma_lightning.callbacks.continuations import ContinuationWriter
from dma_lightning.callbacks.fit_report import FitReport
from dma_lightning.callbacks.gradient_guard import GradientGuard, UnstableTrainingError
from dma_lightning.callbacks.mixed_windows import MixedWindows

__all__ = ["ContinuationWriter", "FitReport", "GradientGuard", "MixedWindows", "UnstableTrainingError"]
