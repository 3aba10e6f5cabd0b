"""Models of the Hugging Face Hub.

- `doge`: folders of `DogeForCausalLM`, read and written
- `folders`: folders of all families that a decoder of ours can express, read
- `config`: `config.json` and `ModelConfig`
- `weight_files`: weights in one file or several
"""

from dma_lightning.huggingface.doge import load_doge, save_doge

__all__ = ["load_doge", "save_doge"]
