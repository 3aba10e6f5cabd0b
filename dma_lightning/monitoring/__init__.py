"""Callbacks that watch a run and change nothing in it; docs/tensorboard.md lists what they log.

- `speed`: tokens per second, FLOPs and memory; `peaks`: the peak FLOP/s of a device
- `exchanges`: the traffic between processes that divide sequences
- `dynamic_masks`, `samples`: masks, scores and texts of a model in training; `recording`: how they inspect layers
- `lost_mass`: attention on keys that masks have dropped; `drifts`: how fast keys fall behind
- `far_copies`: the loss of tokens that can only be copied from far back
- `text_masks`: pictures of the masks over any text, without a run
- `summary`: a table of the run, at its start; `progress`: a bar, or lines; `final_metrics`: the last metrics next to
  the hyperparameters; `overview`: which curves TensorBoard shows first
- `writer`: sends pictures, histograms and texts to loggers
"""

from dma_lightning.monitoring.drifts import DriftMonitor
from dma_lightning.monitoring.dynamic_masks import DynamicMaskMonitor
from dma_lightning.monitoring.exchanges import ContextMonitor
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
    "ContextMonitor",
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
