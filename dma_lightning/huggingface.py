"""Doge models of Hugging Face Transformers in and out: `config.json` and safetensors, never a pickle.

Source: Hugging Face Transformers, `models/doge`.
"""

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dma_lightning.atomic_files import sync_folder, write_error
from dma_lightning.checksums import check_sums, write_sums
from dma_lightning.model import DogeForCausalLM, ModelConfig
from dma_lightning.reading import check_regular, read_json
from dma_lightning.safetensors_files import WEIGHTS, open_weights, shapes, tensors

T = TypeVar("T")

# So that no product of sizes overflows.
_Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)] | None
_Heads = Annotated[int, msgspec.Meta(ge=1, le=1 << 16)] | None
_Count = Annotated[int, msgspec.Meta(ge=1, le=(1 << 31) - 1)] | None
_Positive = Annotated[float, msgspec.Meta(gt=0)] | None


class RopeFile(msgspec.Struct):
    """The rotary embedding in a `config.json`."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: _Positive = None
    factor: _Positive = None


class DogeFile(msgspec.Struct):
    """What is read of a `config.json`; null is no value."""

    model_type: str | None = None
    is_moe: bool | None = None
    hidden_act: str | None = "silu"
    sliding_window: int | None = None
    attention_dropout: float | None = None
    vocab_size: _Size = None
    max_position_embeddings: _Count = None
    hidden_size: _Size = None
    intermediate_size: _Size = None
    num_hidden_layers: _Count = None
    num_attention_heads: _Heads = None
    num_key_value_heads: _Heads = None
    head_dim: _Heads = None
    keep_window_size: _Count = None
    rms_norm_eps: _Positive = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    hidden_dropout: float | None = None
    tie_word_embeddings: bool | None = None
    initializer_range: _Positive = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    rope_theta: _Positive = None
    rope_scaling: RopeFile | None = None
    rope_parameters: RopeFile | None = None


# Fields that both configurations have under the same name.
_SHARED = (
    "vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "keep_window_size", "rms_norm_eps", "attention_bias", "mlp_bias",
    "hidden_dropout", "tie_word_embeddings", "initializer_range", "bos_token_id", "eos_token_id",
)  # fmt: skip
# What Transformers takes a missing field for, where it is not what we take it for.
_DEFAULTS = {
    "vocab_size": 32768, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 32,
    "num_attention_heads": 8, "max_position_embeddings": 2048, "keep_window_size": 2048, "tie_word_embeddings": False,
}  # fmt: skip
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def load_doge(folder: Path | str, **changed: Any) -> DogeForCausalLM:
    """A model that `DogeForCausalLM.save_pretrained` of Transformers wrote, in the dtype of its weights.

    Dynamic scaling of the rotary embedding, which changes nothing up to `max_position_embeddings`, is left out. Nothing
    is built before `config.json` is known to fit the weights. Files that a `SHA256SUMS` lists must have these hashes.

    Args:
        folder: holds `config.json` and `model.safetensors`, in one file or in several with an index.
        changed: fields of `ModelConfig` to set otherwise, such as `backend`.

    Raises:
        ValueError: if a file is missing or damaged, or the model is one that cannot be expressed here.
    """
    folder = Path(folder)
    check_sums(folder)
    file = read_json(folder / "config.json", DogeFile, "config.json of a Doge model")
    weights = open_weights(folder)
    model = _unfilled_model(folder / "config.json", file, changed, _renamed(shapes(weights)))
    ours, config = _renamed(tensors(weights)), model.config
    if config.tie_word_embeddings:
        table = ours["embed_tokens.weight"]
        if not torch.equal(ours.setdefault("lm_head.weight", table), table):
            raise ValueError(
                f"{folder}: tie_word_embeddings is set, but lm_head.weight is not the embedding; "
                "set it to false in config.json if both are meant"
            )
    if wrong := sorted({str(x.dtype) for x in ours.values() if not x.is_floating_point()}):
        raise ValueError(f"{folder}: expected weights in floating point, got {wrong}")
    model.load_state_dict(ours, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model.requires_grad_(True)


def _renamed(named: dict[str, T]) -> dict[str, T]:
    return {name.removeprefix("model."): x for name, x in named.items()}


def _unfilled_model(
    path: Path, file: DogeFile, changed: dict[str, Any], found: dict[str, list[int]]
) -> DogeForCausalLM:
    """The model of a `config.json` on no device, if its names and shapes are those that are found in the weights."""
    try:
        config = ModelConfig(**config_from_doge(file) | changed)
        layers = len({name.split(".")[1] for name in found if name.startswith("layers.")})
        if config.num_hidden_layers != layers:  # before so many are made
            raise ValueError(f"num_hidden_layers: expected {layers}, as in the weights, got {config.num_hidden_layers}")
        with torch.device("meta"):
            model = DogeForCausalLM(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    expected = {name: list(x.shape) for name, x in model.state_dict().items()}
    if config.tie_word_embeddings and "embed_tokens.weight" in found:
        found = {"lm_head.weight": found["embed_tokens.weight"]} | found
    if expected != found:
        raise ValueError(f"{path.parent}: weights do not belong to config.json: {_difference(expected, found)}")
    return model


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
    weight = model.embed_tokens.weight
    config["dtype"] = str(weight.dtype).removeprefix("torch.")
    weights = {name: x.detach().cpu().contiguous() for name, x in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    with new_folder(folder) as unfinished:
        (unfinished / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        named = {name if name.startswith("lm_head.") else f"model.{name}": x for name, x in weights.items()}
        try:
            save_file(named, unfinished / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:  # on a full disk
            raise write_error(unfinished / WEIGHTS, error) from error
        shutil.copymode(unfinished / "config.json", unfinished / WEIGHTS)  # the library's is for the owner alone
        if tokenizer_folder is not None:
            copy_tokenizer(Path(tokenizer_folder), unfinished)
        if tokenizer_json is not None:
            (unfinished / "tokenizer.json").write_text(tokenizer_json)
        write_sums(unfinished)


def config_from_doge(file: DogeFile) -> dict[str, Any]:
    """Fields of `ModelConfig` of a Doge `config.json`.

    Raises:
        ValueError: for a model that cannot be expressed here.
    """
    if file.model_type != "doge":
        raise ValueError(f"expected model_type 'doge', got {file.model_type!r}")
    if file.is_moe:
        raise ValueError(
            "is_moe is set; mixtures of experts are not supported, also because the router of the public "
            "implementation pairs halves of different tokens and so lets a token see later ones"
        )
    for name, value in (("hidden_act", "silu"), ("sliding_window", None)):
        if getattr(file, name) != value:
            raise ValueError(f"{name}: expected {value!r}, got {getattr(file, name)!r}")
    if file.attention_dropout:
        raise ValueError(f"attention_dropout: expected 0, got {file.attention_dropout}; set it to 0")
    names = (*_SHARED, "head_dim")
    fields = _DEFAULTS | {name: getattr(file, name) for name in names if getattr(file, name) is not None}
    fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
    return fields | _rope_fields(file)


def _rope_fields(file: DogeFile) -> dict[str, float]:
    """Base and scaling of the rotary embedding, of new and of old configurations."""
    rope = {"rope_theta": file.rope_theta or 10_000.0}
    for part in (file.rope_scaling, file.rope_parameters):  # the newer name wins
        rope |= {name: x for name, x in msgspec.structs.asdict(part or RopeFile()).items() if x is not None}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "dynamic", "linear"):
        raise ValueError(f"rope_type: expected 'default', 'dynamic' or 'linear', got {kind!r}")
    if kind == "linear" and "factor" not in rope:
        raise ValueError("rope_parameters: expected a factor for rope_type 'linear', got none")
    # "dynamic" is "default" up to max_position_embeddings.
    return {"rope_theta": rope["rope_theta"], "rope_scaling": rope["factor"] if kind == "linear" else 1.0}


def doge_config(config: ModelConfig) -> dict[str, Any]:
    """`config.json` of a model.

    Raises:
        ValueError: if Doge cannot express the model.
    """
    for name, value in (("attention", "dma"), ("score_form", "exp"), ("keep_last", 0), ("sinks", 0)):
        if getattr(config, name) != value:
            raise ValueError(
                f"{name} = {getattr(config, name)!r}: the Doge model of Transformers knows only {value!r}, "
                "so it would compute something else; such a model cannot be exported"
            )
    fields = {name: getattr(config, name) for name in _SHARED}
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling != 1:
        rope |= {"rope_type": "linear", "factor": config.rope_scaling}
    if config.head_dim is not None:
        fields["head_dim"] = config.head_dim
    return {
        "architectures": ["DogeForCausalLM"], "model_type": "doge", "hidden_act": "silu", "is_moe": False,
        "rope_parameters": rope, **fields,
    }  # fmt: skip


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


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer files that there are.

    Links are followed within the folder alone, and to the files of the Hugging Face cache if the folder is one of its
    snapshots: a folder from elsewhere could otherwise have any file of this machine copied and passed on.

    Raises:
        ValueError: if one is no regular file, or a link to one elsewhere.
    """
    inside = source.resolve()
    roots = [inside, inside.parents[1] / "blobs"] if inside.parent.name == "snapshots" else [inside]
    for path in (source / name for name in _TOKENIZER_FILES):
        if not path.exists() and not path.is_symlink():
            continue
        check_regular(path, "a tokenizer file")
        if not any(path.resolve().is_relative_to(root) for root in roots):
            raise ValueError(
                f"{path}: expected a file of this folder, got a link to {path.resolve()}; copy the file there if it "
                "is meant"
            )
        shutil.copyfile(path, target / path.name)


def _difference(expected: dict[str, list[int]], found: dict[str, list[int]]) -> str:
    """The first few names and shapes in which two differ."""
    names = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    lines = [f"{name} expected {expected.get(name, 'none')}, got {found.get(name, 'none')}" for name in names[:5]]
    return "; ".join(lines) + (f"; and {len(names) - 5} more" if len(names) > 5 else "")
