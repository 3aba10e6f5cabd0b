"""Callbacks that make a run visible in TensorBoard, in the progress bar and at its start; see docs/tensorboard.md."""

from dma_lightning.monitoring.dynamic_masks import DynamicMaskMonitor
from dma_lightning.monitoring.final_metrics import FinalMetrics
from dma_lightning.monitoring.progress import ProgressBar
from dma_lightning.monitoring.samples import SampleMonitor
from dma_lightning.monitoring.speed import SpeedMonitor
from dma_lightning.monitoring.summary import RunSummary

__all__ = ["DynamicMaskMonitor", "FinalMetrics", "ProgressBar", "RunSummary", "SampleMonitor", "SpeedMonitor"]
