"""Trainable dynamic mask attention as PyTorch Lightning modules."""

from dma_lightning.attention import DynamicMaskAttention
from dma_lightning.data import MQARDataModule, TextDataModule
from dma_lightning.language_model import LanguageModel
from dma_lightning.model import DogeForCausalLM, ModelConfig

__all__ = [
    "DogeForCausalLM",
    "DynamicMaskAttention",
    "LanguageModel",
    "MQARDataModule",
    "ModelConfig",
    "TextDataModule",
]
