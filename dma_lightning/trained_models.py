"""Models from checkpoints, with their tokenizers, for inference."""

from pathlib import Path
from typing import Any

import torch

from dma_lightning.language_model import LanguageModel
from dma_lightning.saved_run import SavedRun
from dma_lightning.tokenizers import ByteTokenizer, DataTokenizer, FileTokenizer, SpecialTokens, Tokenizer


def load_checkpoint(path: Path, device: str, backend: str | None = None) -> LanguageModel:
    """The model of a checkpoint, in the dtype of its weights, for inference.

    Raises:
        ValueError: if there is no such file or device, or if the file is damaged.
    """
    return model_of(open_checkpoint(path, device), device, backend)


def tokenizer_of(module: LanguageModel, path: Path) -> Tokenizer:
    """The tokenizer of a checkpoint: the one stored in it, bytes, or the `tokenizer.json` next to it.

    Raises:
        ValueError: if none of them fits.
    """
    return saved_tokenizer(SavedRun.open(path), module)


def load_with_tokenizer(
    path: Path, device: str, backend: str | None = None, special_tokens: SpecialTokens = "parse"
) -> tuple[LanguageModel, Tokenizer]:
    """The results of `load_checkpoint` and `saved_tokenizer`; the file is opened once."""
    saved = open_checkpoint(path, device)
    module = model_of(saved, device, backend)
    return module, saved_tokenizer(saved, module, special_tokens)


def open_checkpoint(path: Path, device: str) -> SavedRun:
    """Open a checkpoint for inference on a device.

    Raises:
        ValueError: if there is no such file or device, or if the file is damaged.
    """
    if path.is_dir():
        raise ValueError(
            f"ckpt_path: expected a checkpoint file, got {path}, a folder; training with FSDP2 writes a file without "
            "save_distributed_checkpoint"
        )
    if not path.is_file():
        raise ValueError(f"ckpt_path: expected a checkpoint file, got {str(path)!r}; look under runs/")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: expected one of this machine, got {device!r}: {error}") from error
    return SavedRun.open(path)


def model_of(saved: SavedRun, device: str, backend: str | None = None) -> LanguageModel:
    """The model of an opened checkpoint, as `load_checkpoint` returns it.

    Raises:
        ValueError: if the checkpoint holds no model of this package.
    """
    changed: dict[str, Any] = {} if backend is None else {"backend": backend}
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(saved.content["state_dict"]["model.embed_tokens.weight"].dtype)
        module = LanguageModel.from_saved(saved, **changed)
    except (RuntimeError, KeyError, TypeError) as error:
        reason, *_ = f"{error}\n".splitlines()  # the first line: there may be one for each weight that differs
        raise ValueError(f"{saved.path}: expected a checkpoint of `dma-lightning`, got another ({reason})") from error
    finally:
        torch.set_default_dtype(before)
    return module.to(device).eval()


def saved_tokenizer(saved: SavedRun, module: LanguageModel, special_tokens: SpecialTokens = "parse") -> DataTokenizer:
    """The tokenizer of an opened checkpoint, as `tokenizer_of` returns it.

    Args:
        saved: the checkpoint.
        module: its model.
        special_tokens: whether text that spells a special token becomes that token (parse) or stays text.

    Raises:
        ValueError: if none fits.
    """
    vocabulary, file = module.model.config.vocab_size, saved.path.resolve().parent / "tokenizer.json"
    carried = saved.tokenizer
    if reads_bytes(saved, module):
        return ByteTokenizer()
    if carried is None and not file.exists():
        raise ValueError(
            f"{saved.path}: expected a model of text: one of bytes, or one with a tokenizer.json beside the "
            f"checkpoint; got one of {vocabulary} tokens and no tokenizer"
        )
    if carried is None:
        tokenizer = FileTokenizer(file, special_tokens)
    else:
        tokenizer = FileTokenizer.of_json(carried, special_tokens)
    if tokenizer.vocab_size > vocabulary:
        raise ValueError(
            f"tokenizer of {saved.path}: expected at most the {vocabulary} tokens of the model, got "
            f"{tokenizer.vocab_size}; put the tokenizer.json that the model was trained with beside the checkpoint"
        )
    return tokenizer


def reads_bytes(saved: SavedRun, module: LanguageModel) -> bool:
    """Whether the tokens of an opened checkpoint's model are bytes, possibly with special tokens in addition."""
    tokens, size = module.model.config.vocab_size, module.hparams["bytes_per_token"]
    fits = size is not None if tokens == ByteTokenizer.vocab_size else size == 1 and tokens > ByteTokenizer.vocab_size
    return fits and saved.tokenizer is None
