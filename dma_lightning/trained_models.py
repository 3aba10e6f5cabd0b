"""Models out of checkpoints, with their tokenizers, to infer with."""

from pathlib import Path

import torch

from dma_lightning.checkpoints.files import read_checkpoint
from dma_lightning.data.text import TOKENIZER_KEY
from dma_lightning.files.reading import as_kind
from dma_lightning.language_model import LanguageModel
from dma_lightning.tokenizers import ByteTokenizer, FileTokenizer, Tokenizer


def load_checkpoint(path: Path, device: str, backend: str | None = None) -> LanguageModel:
    """The model of a checkpoint, in the dtype of its weights, to infer with.

    Raises:
        ValueError: if there is no such file, or it is damaged.
    """
    if path.is_dir():
        raise ValueError(
            f"ckpt_path: expected a checkpoint file, got {path}, a folder; training with FSDP2 writes a file without "
            "save_distributed_checkpoint"
        )
    if not path.is_file():
        raise ValueError(f"ckpt_path: expected a checkpoint file, got {str(path)!r}; look under runs/")
    changed = {} if backend is None else {"backend": backend}
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: expected one of this machine, got {device!r}: {error}") from error
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(read_checkpoint(path)["state_dict"]["model.embed_tokens.weight"].dtype)
        module = LanguageModel.load_from_checkpoint(path, map_location="cpu", **changed)
    except (RuntimeError, KeyError, TypeError) as error:
        reason, *_ = f"{error}\n".splitlines()  # of a line for each weight that differs
        raise ValueError(f"{path}: expected a checkpoint of `dma-lightning`, got another ({reason})") from error
    finally:
        torch.set_default_dtype(before)
    return module.to(device).eval()


def tokenizer_of(module: LanguageModel, path: Path) -> Tokenizer:
    """The tokenizer of a checkpoint: the one that it carries along, bytes, or `tokenizer.json` beside it.

    Raises:
        ValueError: if there is none that fits.
    """
    vocabulary, file = module.model.config.vocab_size, path.resolve().parent / "tokenizer.json"
    carried = carried_tokenizer(path)
    if carried is None and vocabulary == ByteTokenizer.vocab_size and module.hparams.bytes_per_token is not None:
        return ByteTokenizer()
    if carried is None and not file.exists():
        raise ValueError(
            f"{path}: expected a model of text: one of bytes, or one with a tokenizer.json beside the checkpoint; "
            f"got one of {vocabulary} tokens and no tokenizer"
        )
    tokenizer = FileTokenizer(file) if carried is None else FileTokenizer.of_json(carried)
    if tokenizer.vocab_size > vocabulary:
        raise ValueError(
            f"tokenizer of {path}: expected at most the {vocabulary} tokens of the model, got {tokenizer.vocab_size}"
        )
    return tokenizer


def carried_tokenizer(path: Path) -> str | None:
    """The `tokenizer.json` of the text that a checkpoint was trained on, if there was one."""
    # That of the data module is under its name.
    states = (state for state in read_checkpoint(path).values() if isinstance(state, dict))
    found = next((state[TOKENIZER_KEY] for state in states if TOKENIZER_KEY in state), None)
    return as_kind(found, str | None, f"{path}: {TOKENIZER_KEY}")
