"""Trainable dynamic mask attention as PyTorch Lightning modules.

What a model is, from the inside out:

- `mixers`: the attentions, one a file, each with what it takes of a configuration; `MIXERS` holds them by name
- `backends`: what computes attention over lifetimes, by name; `functional`: dynamic mask attention as one function;
  `rotary`: the rotary embedding
- `config`: `ModelConfig`; `model`: the decoder around a mixer
- `generation`, `sampling`: what a decoder goes on with; `tokenizers`: text and tokens; `vocabularies`: which it knows
- `huggingface`: models of the Hugging Face Hub; `transformers`: dynamic masks in models of Transformers, an extra

How it is trained:

- `data`: data modules; `metrics`, `schedules`, `step_means`: what the LightningModule in `language_model` computes with
- `auxiliary_losses`: losses of layers beside the main one
- `callbacks`: act on a run; `monitoring`: only watch it
- `checkpoints`: written, checked and read; `saved_run`: one that is opened once, and what it says
- `initial_weights`: of a checkpoint or a Hugging Face folder, for a run to begin from
- `trained_models`: models out of checkpoints, to infer with; `evaluation`: what they can do, at other lengths, too
- `strategies`: FSDP2; `distributed`: what processes agree on; `trainer_state`: Lightning's private names
- `cli`: the command line, one file a command

Below them, `files` and `plain_values`: files and values that a stranger may have written.
"""

from dma_lightning.config import ModelConfig
from dma_lightning.data import (
    InductionDataModule,
    MQARDataModule,
    NeedleDataModule,
    PreparedDataModule,
    SelectiveCopyDataModule,
    TextDataModule,
    TextNeedleDataModule,
)
from dma_lightning.functional import dynamic_mask_attention
from dma_lightning.generation import generate, pad_prompts, stream_text, stream_tokens
from dma_lightning.huggingface import load_doge, save_doge, save_for_transformers
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
from dma_lightning.model import DogeForCausalLM
from dma_lightning.sampling import Sampling
from dma_lightning.strategies import FullyShardedStrategy
from dma_lightning.tokenizers import ByteTokenizer, FileTokenizer

__version__ = "0.1.0"

__all__ = [
    "MIXERS",
    "ByteTokenizer",
    "DogeForCausalLM",
    "DynamicMaskAttention",
    "FileTokenizer",
    "FullyShardedStrategy",
    "InductionDataModule",
    "LanguageModel",
    "LatentAttention",
    "MQARDataModule",
    "ModelConfig",
    "MultiHeadAttention",
    "NativeSparseAttention",
    "NeedleDataModule",
    "PreparedDataModule",
    "Sampling",
    "SelectiveCopyDataModule",
    "SlidingWindowAttention",
    "TextDataModule",
    "TextNeedleDataModule",
    "TokenMixer",
    "dynamic_mask_attention",
    "generate",
    "load_doge",
    "pad_prompts",
    "save_doge",
    "save_for_transformers",
    "stream_text",
    "stream_tokens",
]
