"""Trainable dynamic mask attention as PyTorch Lightning modules."""

from dma_lightning.data import MQARDataModule, PreparedDataModule, TextDataModule
from dma_lightning.generation import generate, pad_prompts, stream_text, stream_tokens
from dma_lightning.huggingface import load_doge, save_doge
from dma_lightning.language_model import LanguageModel
from dma_lightning.mixers import (
    MIXERS,
    DynamicMaskAttention,
    LatentAttention,
    MultiHeadAttention,
    NativeSparseAttention,
    SlidingWindowAttention,
    TokenMixer,
)
from dma_lightning.model import DogeForCausalLM, ModelConfig
from dma_lightning.sampling import Sampling
from dma_lightning.tokenizers import ByteTokenizer, FileTokenizer

__all__ = [
    "MIXERS",
    "ByteTokenizer",
    "DogeForCausalLM",
    "DynamicMaskAttention",
    "FileTokenizer",
    "LanguageModel",
    "LatentAttention",
    "MQARDataModule",
    "ModelConfig",
    "MultiHeadAttention",
    "NativeSparseAttention",
    "PreparedDataModule",
    "Sampling",
    "SlidingWindowAttention",
    "TextDataModule",
    "TokenMixer",
    "generate",
    "load_doge",
    "pad_prompts",
    "save_doge",
    "stream_text",
    "stream_tokens",
]
