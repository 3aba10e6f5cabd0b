"""Doge models of Hugging Face Transformers in and out: `config.json` and safetensors, never a pickle.

Source: Hugging Face Transformers, `models/doge`.
"""

import json
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dma_lightning.model import DogeForCausalLM, ModelConfig

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
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def load_doge(folder: Path | str, **changed: Any) -> DogeForCausalLM:
    """A model that `DogeForCausalLM.save_pretrained` of Transformers wrote, in the dtype of its weights.

    Dynamic scaling of the rotary embedding, which changes nothing up to `max_position_embeddings`, is left out.

    Args:
        folder: holds `config.json` and `model.safetensors`, in one file or in several with an index.
        changed: fields of `ModelConfig` to set otherwise, such as `backend`.

    Raises:
        ValueError: if a file is missing or damaged, or the model is one that cannot be expressed here.
    """
    folder = Path(folder)
    try:
        config = ModelConfig(**config_from_doge(json.loads((folder / "config.json").read_text())) | changed)
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: expected config.json of a Doge model: {type(error).__name__}: {error}") from error
    weights = _read_weights(folder)
    ours = {name.removeprefix("model."): x for name, x in weights.items()}
    if config.tie_word_embeddings and "embed_tokens.weight" in ours:
        table = ours["embed_tokens.weight"]
        if not torch.equal(ours.setdefault("lm_head.weight", table), table):
            raise ValueError(
                f"{folder}: tie_word_embeddings is set, but lm_head.weight is not the embedding; "
                "set it to false in config.json if both are meant"
            )
    with torch.device("meta"):
        model = DogeForCausalLM(config)
    expected = {name: list(x.shape) for name, x in model.state_dict().items()}
    found = {name: list(x.shape) for name, x in ours.items()}
    if expected != found:
        raise ValueError(f"{folder}: weights do not belong to config.json: {_difference(expected, found)}")
    if wrong := sorted({str(x.dtype) for x in ours.values() if not x.is_floating_point()}):
        raise ValueError(f"{folder}: expected weights in floating point, got {wrong}")
    model.load_state_dict(ours, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model.requires_grad_(True)


def save_doge(
    model: DogeForCausalLM,
    folder: Path | str,
    tokenizer_folder: Path | str | None = None,
    tokenizer_json: str | None = None,
) -> None:
    """Write a model that `DogeForCausalLM.from_pretrained` of Transformers reads.

    All is written into a temporary folder beside and moved into place, so `folder` is whole or not there.

    Args:
        model: what to write.
        folder: must not exist, or be empty.
        tokenizer_folder: a folder whose tokenizer files are copied along.
        tokenizer_json: what `tokenizer.json` shall say, if not what that of the folder does.

    Raises:
        ValueError: if Doge cannot express the model, or the folder is not empty.
    """
    config = doge_config(model.config)
    weight = model.embed_tokens.weight
    config["dtype"] = str(weight.dtype).removeprefix("torch.")
    tensors = {name: x.detach().cpu().contiguous() for name, x in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    with new_folder(folder) as unfinished:
        (unfinished / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        named = {name if name.startswith("lm_head.") else f"model.{name}": x for name, x in tensors.items()}
        save_file(named, unfinished / _WEIGHTS, metadata={"format": "pt"})
        shutil.copymode(unfinished / "config.json", unfinished / _WEIGHTS)  # the library's is for the owner alone
        if tokenizer_folder is not None:
            copy_tokenizer(Path(tokenizer_folder), unfinished)
        if tokenizer_json is not None:
            (unfinished / "tokenizer.json").write_text(tokenizer_json)


def config_from_doge(raw: dict[str, Any]) -> dict[str, Any]:
    """Fields of `ModelConfig` of a Doge `config.json`.

    Raises:
        ValueError: for a model that cannot be expressed here.
    """
    if raw.get("model_type") != "doge":
        raise ValueError(f"config.json: expected model_type 'doge', got {raw.get('model_type')!r}")
    if raw.get("is_moe"):
        raise ValueError(
            "config.json: is_moe is set; mixtures of experts are not supported, also because the router of the public "
            "implementation pairs halves of different tokens and so lets a token see later ones"
        )
    for name, value in (("hidden_act", "silu"), ("sliding_window", None)):
        if raw.get(name, value) != value:
            raise ValueError(f"config.json: {name}: expected {value!r}, got {raw[name]!r}")
    if raw.get("attention_dropout"):
        raise ValueError(f"config.json: attention_dropout: expected 0, got {raw['attention_dropout']}; set it to 0")
    fields = {name: raw[name] for name in _SHARED if raw.get(name) is not None}
    fields = _DEFAULTS | fields
    fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
    if raw.get("head_dim") is not None:
        fields["head_dim"] = raw["head_dim"]
    return fields | _rope_fields(raw)


def _rope_fields(raw: dict[str, Any]) -> dict[str, float]:
    """Base and scaling of the rotary embedding, of new and of old configurations."""
    rope = {"rope_theta": raw.get("rope_theta", 10_000.0)}
    rope |= raw.get("rope_scaling") or {}
    rope |= raw.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "dynamic", "linear"):
        raise ValueError(f"config.json: rope_type: expected 'default', 'dynamic' or 'linear', got {kind!r}")
    # "dynamic" is "default" up to max_position_embeddings.
    return {"rope_theta": float(rope["rope_theta"]), "rope_scaling": float(rope["factor"]) if kind == "linear" else 1.0}


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
    """A temporary folder that becomes `folder` at the end, and is removed if anything fails.

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
        unfinished.replace(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer files that there are."""
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of the safetensors files.

    Raises:
        ValueError: if files are missing or damaged.
    """
    try:
        if (folder / _WEIGHTS).exists() or not (folder / _INDEX).exists():
            return load_file(folder / _WEIGHTS)
        files = set(json.loads((folder / _INDEX).read_text())["weight_map"].values())
        if any(Path(name).name != name for name in files):
            raise ValueError(f"expected plain file names, got {sorted(files)}")
        tensors: dict[str, Tensor] = {}
        for name in sorted(files):
            tensors |= load_file(folder / name)
        return tensors
    except (OSError, SafetensorError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{folder}: expected weights in {_WEIGHTS} (other formats are not read): {type(error).__name__}: {error}"
        ) from error


def _difference(expected: dict[str, list[int]], found: dict[str, list[int]]) -> str:
    """The first few names and shapes in which two differ."""
    names = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    lines = [f"{name} expected {expected.get(name, 'none')}, got {found.get(name, 'none')}" for name in names[:5]]
    return "; ".join(lines) + (f"; and {len(names) - 5} more" if len(names) > 5 else "")
