"""Data modules, all of sequences of one length.

- `base`: what they share: batches, loaders, the position in the data; `restoring`: what they take from a checkpoint
- `text`: text files, as bytes or tokens; `prepared`: what `dma-lightning prepare` has written
- `drawn`: tasks whose examples are drawn: `mqar` (associative recall), `selective_copy`, `induction`,
  `needles` (in a haystack of tokens), `text_needles` (in one of text)

Below these: `find_files` and `text_formats` (text as it comes), `arrays`, `shards`, `manifests` and `text_cache`
(tokens on the disk), `windows` and `samplers` (which part of them a sequence is, and in which order they come).
"""

from dma_lightning.data.base import IGNORE_INDEX, Batch, SequenceDataModule
from dma_lightning.data.induction import InductionDataModule
from dma_lightning.data.mqar import MQARDataModule, MQARTask
from dma_lightning.data.needles import HaystackDataModule, HaystackTask, NeedleDataModule
from dma_lightning.data.prepared import PreparedDataModule
from dma_lightning.data.selective_copy import SelectiveCopyDataModule
from dma_lightning.data.text import TextDataModule
from dma_lightning.data.text_needles import TextNeedleDataModule

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "HaystackDataModule",
    "HaystackTask",
    "InductionDataModule",
    "MQARDataModule",
    "MQARTask",
    "NeedleDataModule",
    "PreparedDataModule",
    "SelectiveCopyDataModule",
    "SequenceDataModule",
    "TextDataModule",
    "TextNeedleDataModule",
]
