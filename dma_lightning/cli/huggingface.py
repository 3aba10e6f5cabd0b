"""`dma-lightning import-hf` and `export-hf`: convert checkpoints from and to Hugging Face Transformers."""

import dataclasses
from pathlib import Path

import lightning.pytorch as pl
import torch

from dma_lightning.checkpoints.io import AtomicCheckpointIO
from dma_lightning.huggingface.config import beyond_doge
from dma_lightning.huggingface.doge import load_doge, new_folder
from dma_lightning.huggingface.own import save_for_transformers
from dma_lightning.huggingface.tokenizer_files import byte_tokenizer_json, copy_tokenizer, has_bytes
from dma_lightning.language_model import LanguageModel
from dma_lightning.tokenizers import ByteTokenizer
from dma_lightning.trained_models import model_of, open_checkpoint, reads_bytes


def import_hf(source: Path, target: Path) -> None:
    """Convert a Doge model that Hugging Face Transformers saved to a checkpoint, and copy its tokenizer files.

    The checkpoint is for `generate` and Python; it holds no training state, so `fit` cannot resume from it. A model
    with 256 tokens reads bytes if it has no tokenizer, or the byte tokenizer of an export. Files listed in a SHA256SUMS
    must match their hashes.

    Args:
        source: folder with config.json, and model.safetensors or pytorch_model.bin.
        target: new folder for model.ckpt and the tokenizer files.
    """
    model = load_doge(source)
    with new_folder(target) as unfinished:
        copy_tokenizer(source, unfinished)
        is_bytes = model.config.vocab_size == ByteTokenizer.vocab_size and has_bytes(unfinished / "tokenizer.json")
        with torch.device("meta"):
            module = LanguageModel(bytes_per_token=1.0 if is_bytes else None, **dataclasses.asdict(model.config))
        checkpoint = {
            "state_dict": {f"model.{name}": x for name, x in model.state_dict().items()},
            module.CHECKPOINT_HYPER_PARAMS_KEY: dict(module.hparams),
            "pytorch-lightning_version": pl.__version__,
            "epoch": 0,
            "global_step": 0,
        }
        AtomicCheckpointIO().save_checkpoint(checkpoint, unfinished / "model.ckpt")
    print(f"written to {target / 'model.ckpt'}")


def export_hf(ckpt_path: Path, target: Path) -> None:
    """Write a model for `AutoModelForCausalLM.from_pretrained` of Hugging Face Transformers.

    It becomes a Doge model if Doge can express it, else a model of our own class, which
    `import dma_lightning.transformers` registers with Transformers. The folder also gets the tokenizer files beside the
    checkpoint, and the tokenizer and chat template in it; a model that reads bytes gets a byte tokenizer. SHA256SUMS
    lists the hashes of all files.

    Args:
        ckpt_path: a checkpoint.
        target: new folder for config.json, model.safetensors and SHA256SUMS.
    """
    saved = open_checkpoint(ckpt_path, "cpu")
    module = model_of(saved, "cpu")
    tokenizer = byte_tokenizer_json() if reads_bytes(saved, module) else saved.tokenizer
    beside = ckpt_path.resolve().parent
    kind = save_for_transformers(module.model, target, beside, tokenizer, saved.chat_template)
    hint = "" if kind == "doge" else "; to load it, first import dma_lightning.transformers"
    print(f"written to {target} as a model of type {kind}{hint}")
    if beyond := beyond_doge(module.model.config):
        fields = ", ".join(f"{name} {x!r}" for name, x in beyond.items())
        print(f"Doge cannot express {fields}; only models trained without these become models of type doge")
