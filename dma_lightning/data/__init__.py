"""Data modules. All of them give sequences of one length.

- `base`: what they share: batches, loaders, the position in the data; `restoring`: what they take from a checkpoint
- `text`: text files, as bytes or tokens; `prepared`: folders that `dma-lightning prepare` has written
- `chat`: conversations to fine-tune on; `chat_templates` writes them as text, `conversations` as tokens, and `packing`
  puts them into sequences
- `drawn`: tasks that draw their examples: `mqar` (associative recall), `selective_copy`, `induction`,
  `needles` (in a haystack of tokens), `text_needles` (in a haystack of text)

Below these: `find_files`, `text_formats` and `row_formats` (raw text), `arrays`, `shards`, `manifests` and `text_cache`
(tokens on disk), `windows`, `samplers` and `mixtures` (which tokens form a sequence, and the order of the
sequences), `parts` (sequences that several processes divide).
"""

from dma_lightning.data.base import IGNORE_INDEX, Batch, SequenceDataModule
from dma_lightning.data.chat import ChatDataModule
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
    "ChatDataModule",
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
