"""Trainable dynamic mask attention as PyTorch Lightning modules.

The model, from the inside out:

- `mixers`: the attentions, one file each, with their part of the configuration; `MIXERS` holds them by name
- `backends`: the implementations of attention over lifetimes, by name; `functional`: dynamic mask attention as one
  function; `rotary`: the rotary embedding
- `config`: `ModelConfig`; `model`: the decoder around a mixer
- `generation`, `sampling`: continuing a text; `tokenizers`: text and tokens; `vocabularies`: which tokens are known
- `huggingface`: models of the Hugging Face Hub; `transformers`: dynamic masks in models of Transformers, an extra

Training:

- `data`: data modules; `metrics`, `schedules`, `step_means`: used by the LightningModule in `language_model`
- `trained_parts`: freezing parts of a model; `lora`: low-rank adapters, an extra
- `losses`: the main loss; `auxiliary_losses`: losses of layers in addition to it
- `callbacks`: act on a run; `monitoring`: only watch it
- `checkpoints`: writing, checking and reading them; `saved_run`: an opened checkpoint and its contents
- `initial_weights`: weights of a checkpoint or a Hugging Face folder that a run starts from
- `trained_models`: models from checkpoints, for inference; `evaluation`: how well they do, including at other lengths
- `strategies`: FSDP2 and context parallelism; `distributed`: what processes agree on
- `trainer_state`: the only module that uses Lightning's private names
- `cli`: the command line, one file per command

Below them, `files` and `plain_values` handle files and values that a stranger may have written.
"""

from dma_lightning.config import ModelConfig
from dma_lightning.data import (
    ChatDataModule,
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
    "ChatDataModule",
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
