"""Writing any of our models for `AutoModelForCausalLM` of Transformers: as Doge if possible, else with its own class.

`import dma_lightning.transformers` registers this class.
"""

import dataclasses
from pathlib import Path
from typing import Any

from dma_lightning.huggingface.config import beyond_doge
from dma_lightning.huggingface.doge import save_doge, saved_weights, write_model
from dma_lightning.model import DogeForCausalLM

MODEL_TYPE, CLASS_NAME = "dma_lightning", "DmaLightningForCausalLM"


def save_for_transformers(
    model: DogeForCausalLM,
    folder: Path | str,
    tokenizer_folder: Path | str | None = None,
    tokenizer_json: str | None = None,
    chat_template: str | None = None,
) -> str:
    """Write a model that `AutoModelForCausalLM.from_pretrained` of Transformers reads; arguments as in `save_doge`.

    Returns:
        The model type in `config.json`: `doge`, or `dma_lightning`, which `import dma_lightning.transformers` registers
        with Transformers.

    Raises:
        ValueError: if the folder is not empty, or the tokenizer is damaged.
        OSError: if a file cannot be written.
    """
    if beyond_doge(model.config):
        named = {f"decoder.{name}": x for name, x in saved_weights(model).items()}
        write_model(folder, own_config(model), named, tokenizer_folder, tokenizer_json, chat_template)
        return MODEL_TYPE
    save_doge(model, folder, tokenizer_folder, tokenizer_json, chat_template)
    return "doge"


def own_config(model: DogeForCausalLM) -> dict[str, Any]:
    """Content of `config.json` for a model with its own class; the backend is `auto`."""
    shape = dataclasses.asdict(dataclasses.replace(model.config, backend="auto"))
    config = {name: shape[name] for name in ("tie_word_embeddings", "bos_token_id", "eos_token_id")}
    return {"architectures": [CLASS_NAME], "model_type": MODEL_TYPE, "shape": shape, **config}
