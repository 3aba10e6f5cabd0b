"""Callbacks that make a run visible in TensorBoard, in the progress bar and at its start; see docs/tensorboard.md."""

from dma_lightning.monitoring.speed import SpeedMonitor
from dma_lightning.monitoring.summary import RunSummary

__all__ = ["RunSummary", "SpeedMonitor"]
