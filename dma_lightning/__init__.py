"""Trainable dynamic mask attention as PyTorch Lightning modules."""

from dma_lightning.attention import DynamicMaskAttention
from dma_lightning.data import MQARDataModule, TextDataModule
from dma_lightning.generation import ByteTokenizer, generate, pad_prompts, stream_text, stream_tokens
from dma_lightning.language_model import LanguageModel
from dma_lightning.model import DogeForCausalLM, ModelConfig
from dma_lightning.sampling import Sampling

__all__ = [
    "ByteTokenizer",
    "DogeForCausalLM",
    "DynamicMaskAttention",
    "LanguageModel",
    "MQARDataModule",
    "ModelConfig",
    "Sampling",
    "TextDataModule",
    "generate",
    "pad_prompts",
    "stream_text",
    "stream_tokens",
]
