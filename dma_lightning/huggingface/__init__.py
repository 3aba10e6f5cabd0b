"""Models of the Hugging Face Hub.

- `doge`: folders of `DogeForCausalLM`, read and written
- `folders`: folders of all families that a decoder of ours can express, read
- `own`: folders that any model of ours is written to
- `config`: `config.json` and `ModelConfig`
- `weight_files`: weights in one file or several; `tokenizer_files`: what lies beside them
"""

from dma_lightning.huggingface.doge import load_doge, save_doge
from dma_lightning.huggingface.own import save_for_transformers

__all__ = ["load_doge", "save_doge", "save_for_transformers"]
