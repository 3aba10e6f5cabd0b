"""What a checkpoint can do, beyond the length that it was trained at, too.

- `needles`: answers by the length of a haystack and the depth of the needle
- `lengths`: the test set of its data, at other lengths; `positions`: the loss by position in a document

Below these: `trained_run` (a checkpoint, and its data at another length), `reading` (with a cache, a chunk at a time),
`scores` (what labels add up to), `costs` (time and memory) and `reports` (tables and files).
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
