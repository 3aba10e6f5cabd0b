"""Evaluation of checkpoints, including at lengths beyond the training length.

- `needles`: answers by haystack length and needle depth
- `lengths`: the test set of a checkpoint's data, at other lengths; `positions`: the loss by position in a document
- `harness`: a model for lm-evaluation-harness, which the extra `eval` installs

Below these: `trained_run` (a checkpoint, and its data at another length), `reading` (with a cache, one chunk at a
time), `continuations` (of contexts), `scores` (sums over labels), `costs` (time and memory) and `reports` (tables and
files).
"""

from dma_lightning.evaluation.lengths import LengthScores, length_scores
from dma_lightning.evaluation.needles import Cell, NeedleGrid, needle_cells
from dma_lightning.evaluation.positions import Bucket, position_buckets
from dma_lightning.evaluation.reading import Reader
from dma_lightning.evaluation.trained_run import TrainedRun

__all__ = [
    "Bucket",
    "Cell",
    "LengthScores",
    "NeedleGrid",
    "Reader",
    "TrainedRun",
    "length_scores",
    "needle_cells",
    "position_buckets",
]
