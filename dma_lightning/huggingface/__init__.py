"""Models in the format of the Hugging Face Hub.

- `doge`: reads and writes folders of `DogeForCausalLM`
- `folders`: reads folders of all model families that our decoder can express
- `own`: writes any of our models to a folder
- `config`: converts between `config.json` and `ModelConfig`
- `weight_files`: reads weights from one or several files
- `tokenizer_files`: copies and writes a model's tokenizer files
"""

from dma_lightning.huggingface.doge import load_doge, save_doge
from dma_lightning.huggingface.own import save_for_transformers

__all__ = ["load_doge", "save_doge", "save_for_transformers"]
