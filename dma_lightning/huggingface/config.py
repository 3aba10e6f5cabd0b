"""`config.json` of Doge models: what is read of one, and what stands in one.

Source: Hugging Face Transformers, `models/doge`.
"""

from typing import Annotated, Any

import msgspec

from dma_lightning.config import ModelConfig

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
    known = {"attention": "dma", "score_form": "exp", "keep_last": 0, "sinks": 0, "drift": "none"}
    for name, value in known.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{name} = {getattr(config, name)!r}: the Doge model of Transformers knows only {value!r}, "
                "so it would compute something else; save_for_transformers writes such a model in a class of its own"
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
