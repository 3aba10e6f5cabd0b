"""`dma-lightning import-hf` and `export-hf`: checkpoints from and for Hugging Face Transformers."""

import dataclasses
from pathlib import Path

import lightning.pytorch as pl
import torch

from dma_lightning.checkpoints.io import AtomicCheckpointIO
from dma_lightning.huggingface.doge import load_doge, new_folder
from dma_lightning.huggingface.own import save_for_transformers
from dma_lightning.huggingface.tokenizer_files import byte_tokenizer_json, copy_tokenizer, has_bytes
from dma_lightning.language_model import LanguageModel
from dma_lightning.tokenizers import ByteTokenizer
from dma_lightning.trained_models import model_of, open_checkpoint, reads_bytes


def import_hf(source: Path, target: Path) -> None:
    """Make a checkpoint of a Doge model that Hugging Face Transformers saved; its tokenizer files are copied along.

    The checkpoint is for `generate` and Python; it holds no state of a training that `fit` could go on with. A model of
    256 tokens without a tokenizer, or with that of an export, is taken for one of bytes. Files that a SHA256SUMS lists
    must have these hashes.

    Args:
        source: folder with config.json, and model.safetensors or pytorch_model.bin.
        target: new folder, which gets model.ckpt.
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
    """Write a model as `AutoModelForCausalLM.from_pretrained` of Hugging Face Transformers reads it.

    As a Doge model if that can express it, else as one of our own class, which `import dma_lightning.transformers`
    makes known to Transformers. Tokenizer files that lie beside the checkpoint are copied along, and the tokenizer in
    it is; a model of bytes gets one of bytes. SHA256SUMS lists the hashes of all files.

    Args:
        ckpt_path: a checkpoint.
        target: new folder, which gets config.json, model.safetensors and SHA256SUMS.
    """
    saved = open_checkpoint(ckpt_path, "cpu")
    module = model_of(saved, "cpu")
    tokenizer = byte_tokenizer_json() if reads_bytes(saved, module) else saved.tokenizer
    kind = save_for_transformers(module.model, target, ckpt_path.resolve().parent, tokenizer)
    hint = "" if kind == "doge" else ", for Python that has imported dma_lightning.transformers"
    print(f"written to {target} as a model of type {kind}{hint}")
