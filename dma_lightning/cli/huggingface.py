"""`dma-lightning import-hf` and `export-hf`: checkpoints from and for Hugging Face Transformers."""

import dataclasses
from pathlib import Path

import lightning.pytorch as pl
import torch

from dma_lightning.checkpoints.io import AtomicCheckpointIO
from dma_lightning.huggingface.doge import copy_tokenizer, load_doge, new_folder, save_doge
from dma_lightning.language_model import LanguageModel
from dma_lightning.tokenizers import ByteTokenizer
from dma_lightning.trained_models import model_of, open_checkpoint


def import_hf(source: Path, target: Path) -> None:
    """Make a checkpoint of a Doge model that Hugging Face Transformers saved; its tokenizer files are copied along.

    The checkpoint is for `generate` and Python; it holds no state of a training that `fit` could go on with. A model of
    256 tokens without a tokenizer is taken for one of bytes. Files that a SHA256SUMS lists must have these hashes.

    Args:
        source: folder with config.json, and model.safetensors or pytorch_model.bin.
        target: new folder, which gets model.ckpt.
    """
    model = load_doge(source)
    is_bytes = model.config.vocab_size == ByteTokenizer.vocab_size and not (source / "tokenizer.json").exists()
    with torch.device("meta"):
        module = LanguageModel(bytes_per_token=1.0 if is_bytes else None, **dataclasses.asdict(model.config))
    checkpoint = {
        "state_dict": {f"model.{name}": x for name, x in model.state_dict().items()},
        module.CHECKPOINT_HYPER_PARAMS_KEY: dict(module.hparams),
        "pytorch-lightning_version": pl.__version__,
        "epoch": 0,
        "global_step": 0,
    }
    with new_folder(target) as unfinished:
        AtomicCheckpointIO().save_checkpoint(checkpoint, unfinished / "model.ckpt")
        copy_tokenizer(source, unfinished)
    print(f"written to {target / 'model.ckpt'}")


def export_hf(ckpt_path: Path, target: Path) -> None:
    """Write a model as `DogeForCausalLM.from_pretrained` of Hugging Face Transformers reads it.

    Tokenizer files that lie beside the checkpoint are copied along, and the tokenizer in it is. SHA256SUMS lists the
    hashes of all files.

    Args:
        ckpt_path: a checkpoint.
        target: new folder, which gets config.json, model.safetensors and SHA256SUMS.
    """
    saved = open_checkpoint(ckpt_path, "cpu")
    save_doge(model_of(saved, "cpu").model, target, ckpt_path.resolve().parent, saved.tokenizer)
    print(f"written to {target}")
