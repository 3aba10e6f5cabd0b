"""Data modules."""

from dma_lightning.data.base import IGNORE_INDEX, Batch, SequenceDataModule
from dma_lightning.data.mqar import MQARDataModule, MQARTask
from dma_lightning.data.prepared import PreparedDataModule
from dma_lightning.data.text import TextDataModule

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "MQARDataModule",
    "MQARTask",
    "PreparedDataModule",
    "SequenceDataModule",
    "TextDataModule",
]
