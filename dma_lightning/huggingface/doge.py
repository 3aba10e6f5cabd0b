"""Doge models of Hugging Face Transformers in and out: `config.json` and weights.

Source: Hugging Face Transformers, `models/doge`.
"""

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dma_lightning.files.atomic import sync_folder, write_error
from dma_lightning.files.sha256_sums import check_sums, write_sums
from dma_lightning.huggingface.config import doge_config
from dma_lightning.huggingface.folders import PretrainedFolder
from dma_lightning.huggingface.tokenizer_files import copy_tokenizer, describe_tokens
from dma_lightning.huggingface.weight_files import WEIGHTS
from dma_lightning.model import DogeForCausalLM


def load_doge(folder: Path | str, **changed: Any) -> DogeForCausalLM:
    """A model that `DogeForCausalLM.save_pretrained` of Transformers wrote, in the dtype of its weights.

    Dynamic scaling of the rotary embedding, which changes nothing up to `max_position_embeddings`, is left out. Nothing
    is built before `config.json` is known to fit the weights. Files that a `SHA256SUMS` lists must have these hashes.

    Args:
        folder: holds `config.json` and `model.safetensors` or `pytorch_model.bin`, in one file or in several with an
            index.
        changed: fields of `ModelConfig` to set otherwise, such as `backend`.

    Raises:
        ValueError: if a file is missing or damaged, or the model is one that cannot be expressed here.
    """
    folder = Path(folder)
    check_sums(folder)
    found = PretrainedFolder.open(folder, ("doge",))
    model = found.unfilled_model(changed)
    ours = {name: x.read() for name, x in found.tensors.items()}
    found.check_tied()
    if wrong := sorted({str(x.dtype) for x in ours.values() if not x.is_floating_point()}):
        raise ValueError(f"{folder}: expected weights in floating point, got {wrong}")
    model.load_state_dict(ours, assign=True)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model.requires_grad_(True)


def save_doge(
    model: DogeForCausalLM,
    folder: Path | str,
    tokenizer_folder: Path | str | None = None,
    tokenizer_json: str | None = None,
) -> None:
    """Write a model that `DogeForCausalLM.from_pretrained` of Transformers reads.

    All is written into a temporary folder beside and moved into place, so `folder` is whole or not there. `SHA256SUMS`
    lists the hashes of all files.

    Args:
        model: what to write.
        folder: must not exist, or be empty.
        tokenizer_folder: a folder whose tokenizer files are copied along.
        tokenizer_json: what `tokenizer.json` shall say, if not what that of the folder does.

    Raises:
        ValueError: if Doge cannot express the model, or the folder is not empty.
        OSError: if it cannot be written.
    """
    config = doge_config(model.config)
    named = {name if name.startswith("lm_head.") else f"model.{name}": x for name, x in saved_weights(model).items()}
    write_model(folder, config, named, tokenizer_folder, tokenizer_json)


def saved_weights(model: DogeForCausalLM) -> dict[str, Tensor]:
    """Weights of a model by name, on the CPU; tied ones once."""
    weights = {name: x.detach().cpu().contiguous() for name, x in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return weights


def write_model(
    folder: Path | str,
    config: dict[str, Any],
    weights: dict[str, Tensor],
    tokenizer_folder: Path | str | None,
    tokenizer_json: str | None,
) -> None:
    """Write `config.json` and weights by name; the other arguments, and errors, are those of `save_doge`."""
    config["dtype"] = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    with new_folder(folder) as unfinished:
        (unfinished / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        try:
            save_file(weights, unfinished / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:  # on a full disk
            raise write_error(unfinished / WEIGHTS, error) from error
        shutil.copymode(unfinished / "config.json", unfinished / WEIGHTS)  # the library's is for the owner alone
        if tokenizer_folder is not None:
            copy_tokenizer(Path(tokenizer_folder), unfinished)
        if tokenizer_json is not None:
            (unfinished / "tokenizer.json").write_text(tokenizer_json)
        describe_tokens(unfinished, config)
        write_sums(unfinished)


@contextmanager
def new_folder(folder: Path | str) -> Iterator[Path]:
    """A temporary folder that becomes `folder` at the end, with its files on the disk; it is removed if anything fails.

    Raises:
        ValueError: if `folder` is there and not empty.
    """
    folder = Path(folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: expected a new or empty folder, got one with files; nothing is overwritten")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.parent / f".{folder.name}.{secrets.token_hex(8)}"
    unfinished.mkdir()
    try:
        yield unfinished
        for path in unfinished.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        unfinished.replace(folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
