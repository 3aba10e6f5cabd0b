"""Reading `config.json` of Transformers models, and writing it for Doge.

Source: Hugging Face Transformers, `models/doge`, `models/llama`, `models/qwen2`, `models/qwen3`.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from dma_lightning.config import ModelConfig

# Limits, so that no product of sizes overflows.
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
    partial_rotary_factor: _Positive = None


class ConfigFile(msgspec.Struct):
    """The fields that are read from a `config.json`; null means no value."""

    model_type: str | None = None
    is_moe: bool | None = None
    hidden_act: str | None = "silu"
    sliding_window: int | None = None
    use_sliding_window: bool | None = None
    layer_types: list[str] | None = None
    num_experts: int | None = None
    num_local_experts: int | None = None
    quantization_config: dict[str, Any] | None = None
    partial_rotary_factor: _Positive = None
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


@dataclass(frozen=True)
class Family:
    """Models of one `model_type`.

    Attributes:
        defaults: defaults of Transformers for missing fields, where they differ from `ModelConfig`'s.
        fixed: fields with the same value in all models of the family, whatever `config.json` says.
        lacks: name endings of our tensors that these models do not have.
        rope_types: types of rotary embedding that our decoder supports.
    """

    defaults: Mapping[str, Any]
    fixed: Mapping[str, Any]
    lacks: tuple[str, ...]
    rope_types: tuple[str, ...] = ("default", "linear")


_OF_DOGE = ("input_residual", "post_attention_residual", "self_attn.A", "dt_proj.weight", "dt_proj.bias")
_QWEN = {
    "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}  # fmt: skip

FAMILIES = {
    "doge": Family(
        {
            "vocab_size": 32768, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 32,
            "num_attention_heads": 8, "max_position_embeddings": 2048, "keep_window_size": 2048,
            "tie_word_embeddings": False,
        },
        fixed={},
        lacks=(),
        rope_types=("default", "dynamic", "linear"),  # "dynamic" is "default" up to max_position_embeddings
    ),
    "llama": Family(
        {
            "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "max_position_embeddings": 2048, "tie_word_embeddings": False,
        },
        fixed={"hidden_dropout": 0.0, "qk_norm": False},
        lacks=_OF_DOGE,
    ),
    "qwen2": Family(
        _QWEN,
        fixed={"hidden_dropout": 0.0, "qk_norm": False, "attention_bias": True, "mlp_bias": False},
        lacks=(*_OF_DOGE, "o_proj.bias"),
    ),
    "qwen3": Family(
        _QWEN | {"head_dim": 128},
        fixed={"hidden_dropout": 0.0, "mlp_bias": False},
        lacks=_OF_DOGE,
    ),
}  # fmt: skip
"""Models that can be read, by their `model_type`."""

# What every Doge model computes: the published form.
_OF_PUBLISHED: dict[str, Any] = {
    "attention": "dma", "score_form": "exp", "keep_last": 0, "sinks": 0, "wide_layers": (), "drift": "none",
    "content": "values", "content_in_bias": True, "memory_heads": 0.0, "qk_norm": True,
}  # fmt: skip

_UNUSED_WINDOW = ("qwen2", "qwen3")  # their config.json has a sliding_window even if use_sliding_window is false

_MOE = (
    "mixtures of experts are not supported, partly because the router of the public implementation pairs halves of "
    "different tokens, which lets a token see later ones"
)


def config_fields(file: ConfigFile, families: Collection[str] = FAMILIES.keys()) -> dict[str, Any]:
    """Convert a `config.json` to fields of `ModelConfig`.

    Models that attend to their whole past get a `keep_window_size` of `max_position_embeddings`.

    Args:
        file: content of the `config.json`.
        families: names of the families that may be read.

    Raises:
        ValueError: if our decoder cannot express the model; the message names the unsupported field.
    """
    if file.model_type not in families:
        known = " or ".join(map(repr, families))
        experts = file.num_experts or file.num_local_experts
        found = f"{file.model_type!r}{f' with {experts} experts, which are not supported' * bool(experts)}"
        raise ValueError(f"expected model_type {known}, got {found}")
    _check_features(file)
    family = FAMILIES[file.model_type or ""]
    names = (*_SHARED, "head_dim")
    given = {name: getattr(file, name) for name in names if getattr(file, name) is not None}
    fields = {**family.defaults, **given, **family.fixed}
    fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
    if family.lacks:
        fields["keep_window_size"] = fields["max_position_embeddings"]
    return fields | _rope_fields(file, family.rope_types)


def _check_features(file: ConfigFile) -> None:
    """Refuse features that our decoder does not have.

    Raises:
        ValueError: if there is one; the message names its field.
    """
    if file.is_moe:
        raise ValueError(f"is_moe is set; {_MOE}")
    window = None if file.model_type in _UNUSED_WINDOW else file.sliding_window
    sliding = sorted({kind for kind in file.layer_types or () if kind != "full_attention"})
    for name, value, expected in (
        ("hidden_act", file.hidden_act, "silu"),
        ("use_sliding_window", file.use_sliding_window or False, False),
        ("sliding_window", window, None),
        ("layer_types", sliding or "full_attention", "full_attention"),
        ("quantization_config", file.quantization_config, None),
        ("partial_rotary_factor", file.partial_rotary_factor or 1.0, 1.0),
    ):
        if value != expected:
            raise ValueError(f"{name}: expected {expected!r}, got {value!r}")
    if file.attention_dropout:
        raise ValueError(f"attention_dropout: expected 0, got {file.attention_dropout}; set it to 0")


def _rope_fields(file: ConfigFile, known: Collection[str]) -> dict[str, float]:
    """Base and scaling of the rotary embedding, from new and old configurations."""
    rope = {"rope_theta": file.rope_theta or 10_000.0}
    part = file.rope_scaling or file.rope_parameters or RopeFile()  # if both are set, the first counts
    rope |= {name: x for name, x in msgspec.structs.asdict(part).items() if x is not None}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in known:
        *others, last = map(repr, known)
        raise ValueError(f"rope_type: expected {', '.join(others)} or {last}, got {kind!r}")
    if kind == "linear" and "factor" not in rope:
        raise ValueError("rope_parameters: expected a factor for rope_type 'linear', got none")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor: expected 1.0, got {rope['partial_rotary_factor']}")
    return {"rope_theta": rope["rope_theta"], "rope_scaling": rope["factor"] if kind == "linear" else 1.0}


def beyond_doge(config: ModelConfig) -> dict[str, Any]:
    """Fields by which a model computes what Doge cannot express, with their values; empty for a model of Doge's."""
    found = {name: getattr(config, name) for name in _OF_PUBLISHED}
    found["wide_layers"] = tuple(config.wide_layers)  # which a checkpoint has as a list
    return {name: x for name, x in found.items() if x != _OF_PUBLISHED[name]}


def doge_config(config: ModelConfig) -> dict[str, Any]:
    """Content of a Doge model's `config.json`.

    Raises:
        ValueError: if Doge cannot express the model; the message names all fields that differ.
    """
    if beyond := beyond_doge(config):
        got = ", ".join(f"{name} {x!r} (Doge: {_OF_PUBLISHED[name]!r})" for name, x in beyond.items())
        raise ValueError(
            f"expected a model that the Doge model of Transformers can express, got {got}; it would compute something "
            "else; write the model with its own class, by save_for_transformers or dma-lightning export-hf"
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
