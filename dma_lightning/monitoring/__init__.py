"""Callbacks that watch a run, and change nothing in it; what they log is in docs/tensorboard.md.

- `speed`: tokens per second, FLOPs and memory; `peaks`: what a device could do
- `dynamic_masks`, `samples`: masks, scores and texts of a model that trains; `recording`: how layers are looked at
- `lost_mass`: what the keys hold that masks have dropped; `drifts`: how fast keys fall behind
- `far_copies`: the loss of what only a memory can copy
- `text_masks`: pictures of the masks over a text of one's own, without a run
- `summary`: what a run is, at its start; `progress`: the bar, or lines; `final_metrics`: the last figures beside the
  arguments; `overview`: which curves TensorBoard shows first
- `writer`: how pictures, histograms and texts get to loggers
"""

from dma_lightning.monitoring.drifts import DriftMonitor
from dma_lightning.monitoring.dynamic_masks import DynamicMaskMonitor
from dma_lightning.monitoring.far_copies import FarCopyMonitor
from dma_lightning.monitoring.final_metrics import FinalMetrics
from dma_lightning.monitoring.lost_mass import LostMassMonitor
from dma_lightning.monitoring.overview import CurveOverview
from dma_lightning.monitoring.progress import ProgressBar
from dma_lightning.monitoring.samples import SampleMonitor
from dma_lightning.monitoring.speed import SpeedMonitor
from dma_lightning.monitoring.summary import RunSummary
from dma_lightning.monitoring.text_masks import draw_text_masks

__all__ = [
    "CurveOverview",
    "DriftMonitor",
    "DynamicMaskMonitor",
    "FarCopyMonitor",
    "FinalMetrics",
    "LostMassMonitor",
    "ProgressBar",
    "RunSummary",
    "SampleMonitor",
    "SpeedMonitor",
    "draw_text_masks",
]
