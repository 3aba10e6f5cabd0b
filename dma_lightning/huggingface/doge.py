"""Reading and writing Doge models of Hugging Face Transformers: `config.json` and weights.

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
from dma_lightning.lora import has_adapters
from dma_lightning.model import DogeForCausalLM


def load_doge(folder: Path | str, **changed: Any) -> DogeForCausalLM:
    """Load a model that `DogeForCausalLM.save_pretrained` of Transformers wrote, in the dtype of its weights.

    It ignores dynamic scaling of the rotary embedding, which has no effect up to `max_position_embeddings`. It builds
    the model only if `config.json` fits the weights. Files listed in a `SHA256SUMS` must match their hashes.

    Args:
        folder: holds `config.json`, and `model.safetensors` or `pytorch_model.bin`, as one file or as several with an
            index.
        changed: fields of `ModelConfig` to override, such as `backend`.

    Raises:
        ValueError: if a file is missing or damaged, or our decoder cannot express the model.
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
    chat_template: str | None = None,
) -> None:
    """Write a model that `DogeForCausalLM.from_pretrained` of Transformers reads.

    It writes all files to a temporary folder and then renames it, so `folder` is whole or does not exist. `SHA256SUMS`
    lists the hashes of all files.

    Args:
        model: the model to write.
        folder: must be empty or not exist.
        tokenizer_folder: a folder to copy tokenizer files from.
        tokenizer_json: content for `tokenizer.json`, instead of the file in `tokenizer_folder`.
        chat_template: content for `chat_template.jinja`, instead of the file in `tokenizer_folder`.

    Raises:
        ValueError: if Doge cannot express the model, or `folder` is not empty.
        OSError: if a file cannot be written.
    """
    config = doge_config(model.config)
    named = {name if name.startswith("lm_head.") else f"model.{name}": x for name, x in saved_weights(model).items()}
    write_model(folder, config, named, tokenizer_folder, tokenizer_json, chat_template)


def saved_weights(model: DogeForCausalLM) -> dict[str, Tensor]:
    """Weights of a model by name, on the CPU; tied weights appear once.

    Raises:
        ValueError: if it has adapters.
    """
    if has_adapters(model.state_dict()):
        raise ValueError(
            "expected a model without adapters, got one with adapters; merge them with `dma-lightning merge-lora`, or "
            "write only the adapters with `dma-lightning export-lora`"
        )
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
    chat_template: str | None,
) -> None:
    """Write `config.json` and weights by name; other arguments and errors as in `save_doge`."""
    config["dtype"] = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    with new_folder(folder) as unfinished:
        (unfinished / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        try:
            save_file(weights, unfinished / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:  # on a full disk
            raise write_error(unfinished / WEIGHTS, error) from error
        shutil.copymode(unfinished / "config.json", unfinished / WEIGHTS)  # the library lets only the owner read it
        if tokenizer_folder is not None:
            copy_tokenizer(Path(tokenizer_folder), unfinished)
        if tokenizer_json is not None:
            (unfinished / "tokenizer.json").write_text(tokenizer_json)
        if chat_template is not None:
            (unfinished / "chat_template.jinja").write_text(chat_template)
        describe_tokens(unfinished, config)
        write_sums(unfinished)


@contextmanager
def new_folder(folder: Path | str) -> Iterator[Path]:
    """Open a temporary folder that is renamed to `folder` once its files are on disk, and deleted if anything fails.

    Raises:
        ValueError: if `folder` exists and is not empty.
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
