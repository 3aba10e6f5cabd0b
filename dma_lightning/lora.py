"""Low-rank adapters (LoRA) for the decoder's linear layers, with the library peft (extra `lora`).

An adapter adds `alpha / rank · B A x` to the output of a linear layer, whose own weight stays as it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Self, TypedDict

import msgspec
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dma_lightning.files.reading import as_kind, check_regular, read_json
from dma_lightning.model import DogeForCausalLM
from dma_lightning.trained_parts import TrainedPart

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")  # peft's names

_OWN = ".base_layer."  # what peft puts into the name of an adapted map's own parameter
_WRAPPED = "base_model.model."  # what a `PeftModel` puts before the names of the model's parameters
_ADAPTER = ".lora_"  # what is in the names of the adapter's parameters


class LoraArguments(TypedDict, total=False):
    """Options of adapters; missing ones have the defaults of `Lora`."""

    rank: int
    """Rank (width) of the adapters: rows of A and columns of B."""
    alpha: float
    """Adapters are multiplied by alpha / rank."""
    targets: list[str]
    """Names of linear layers, such as q_proj or mlp.up_proj."""
    dropout: float
    """Share of the adapter's inputs that training drops."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Which linear layers get adapters, and of what size.

    Attributes:
        rank: rank (width) of the adapters, at least 1: rows of A and columns of B.
        alpha: adapters are multiplied by alpha / rank.
        targets: names of linear layers within the decoder's layers, or the ends of such names, such as `q_proj` or
            `mlp.up_proj`. None: all that can have adapters.
        dropout: share of the adapter's inputs that training drops.

    Raises:
        ValueError: if a number is out of range.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: Sequence[str] | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                "lora: expected rank >= 1, alpha > 0 and a dropout of at least 0 and below 1, got "
                f"{self.rank}, {self.alpha} and {self.dropout}"
            )

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Self:
        """The adapters that arguments describe.

        Raises:
            ValueError: if one is unknown or out of range.
        """
        if unknown := sorted(arguments.keys() - LoraArguments.__annotations__.keys()):
            raise ValueError(f"lora: expected options among {list(LoraArguments.__annotations__)}, got {unknown}")
        return cls(**arguments)

    def config(self, model: DogeForCausalLM) -> Any:
        """The `LoraConfig` of peft for a model without adapters.

        Raises:
            ValueError: if peft is missing, or a target is not a linear layer that can have an adapter.
        """
        targets = _all_targets(model) if self.targets is None else list(self.targets)
        for target in targets:
            _check_target(model, target)
        return _peft().LoraConfig(
            r=self.rank, lora_alpha=self.alpha, target_modules=targets, lora_dropout=self.dropout, bias="none"
        )


def add_adapters(model: DogeForCausalLM, lora: Lora, train_only: TrainedPart) -> None:
    """Add adapters to linear layers of a model, and freeze all its other weights.

    New adapters do not change what the model computes.

    Args:
        model: without adapters; changed in place. What `train_only` freezes must already be frozen.
        lora: the adapters.
        train_only: a part of the model whose original weights are trained, too; with `all`, only adapters are trained.

    Raises:
        ValueError: if peft is missing, or if a target is not a linear layer, would ignore its adapter, or is trained
            itself.
    """
    trained = [] if train_only == "all" else [p for p in model.parameters() if p.requires_grad]
    _peft().inject_adapter_in_model(lora.config(model), model)
    for parameter in trained:
        parameter.requires_grad_(True)


def add_adapters_of(
    model: DogeForCausalLM, arguments: LoraArguments | None, train_only: TrainedPart, optimizer: str
) -> None:
    """Call `add_adapters` with the arguments of a `LanguageModel`; if they are None, do nothing.

    Raises:
        ValueError: as in `Lora.of` and `add_adapters`; also for Muon, which is meant for whole matrices, not factors.
    """
    if arguments is None:
        return
    if optimizer != "adamw":
        raise ValueError(f"optimizer: expected adamw with lora, got {optimizer!r}; change one of them")
    add_adapters(model, Lora.of(arguments), train_only)


def has_adapters(names: Mapping[str, Any]) -> bool:
    """Whether there are adapters among weights by name."""
    return any(_ADAPTER in name for name in names)


def own_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's original weights, by the names that they have without adapters."""
    return {name.replace(_OWN, "."): x for name, x in weights.items() if _ADAPTER not in name}


def as_peft_model(model: DogeForCausalLM, lora: Lora) -> Any:
    """A copy of a model with adapters on the CPU as a `PeftModel`, which can save, merge and unload them.

    Args:
        model: made by `add_adapters`.
        lora: its adapters.
    """
    peft, weights = _peft(), own_weights(model.state_dict())
    with torch.random.fork_rng(devices=[]):
        plain = DogeForCausalLM(model.config).to(weights["embed_tokens.weight"].dtype)
    plain.load_state_dict(weights)
    wrapped = peft.get_peft_model(plain.eval(), lora.config(plain))
    adapters = {f"{_WRAPPED}{name}": x for name, x in peft.get_peft_model_state_dict(model).items()}
    result = peft.set_peft_model_state_dict(wrapped, adapters)
    assert not _lacking(result)
    return wrapped


def with_adapters_of(model: DogeForCausalLM, folder: Path) -> Any:
    """A `PeftModel` of a model without adapters, with adapters that peft saved.

    Args:
        model: changed in place.
        folder: has `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        ValueError: if a file is missing or damaged, if the adapters are not LoRA of linear layers, or if they do not
            fit the model.
    """
    peft, (config_file, weights_file) = _peft(), (folder / name for name in ADAPTER_FILES)
    check_regular(weights_file, "adapters that peft saved")
    fields = read_json(config_file, dict[str, Any], "adapter_config.json of peft")
    usual = peft.LoraConfig().to_dict()
    if strange := {name: x for name, x in fields.items() if name not in _FREE and x != usual.get(name)}:
        raise ValueError(f"{config_file}: expected plain LoRA of linear layers, got {strange}")
    found = as_kind(fields, _AdapterConfig, str(config_file))
    lora = Lora(rank=found.r, alpha=found.lora_alpha, targets=found.target_modules, dropout=found.lora_dropout)
    try:
        weights = peft.load_peft_weights(str(folder), device="cpu")
        ranks = {len(x) for name, x in weights.items() if "lora_A" in name}
        if ranks != {lora.rank}:  # compared before memory is taken for the adapters
            raise ValueError(f"expected rank {lora.rank}, as in {config_file.name}, got {sorted(ranks)}")
        wrapped = peft.get_peft_model(model, lora.config(model))
        result = peft.set_peft_model_state_dict(wrapped, weights)
    except (ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder}: expected adapters that fit the model, got others: {reason}") from error
    if differ := _lacking(result):
        raise ValueError(f"{folder}: expected adapters of {found.target_modules}, got others: {differ[:3]}")
    return wrapped


# Fields of `adapter_config.json` that `_AdapterConfig` has, or that do not change what merged adapters compute.
_FREE = (
    "r", "lora_alpha", "target_modules", "lora_dropout", "base_model_name_or_path", "auto_mapping", "revision",
    "peft_version", "task_type", "inference_mode", "megatron_core",
)  # fmt: skip


class _AdapterConfig(msgspec.Struct):
    """What the adapters are."""

    r: int
    lora_alpha: float
    target_modules: list[str]
    lora_dropout: float = 0.0


def _lacking(result: Any) -> list[str]:
    """Names of adapters that only the model has, or only the state that peft has loaded."""
    return [*(name for name in result.missing_keys if _ADAPTER in name), *result.unexpected_keys]


def _peft() -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise ValueError("lora: expected the library peft, got none; pip install 'dma-lightning[lora]'") from error
    return peft


def _linear_maps(model: DogeForCausalLM) -> dict[str, nn.Linear]:
    """The linear layers within the decoder's layers, by name."""
    return {name: x for name, x in model.layers.named_modules() if isinstance(x, nn.Linear)}


def _read_maps(model: DogeForCausalLM) -> set[nn.Module]:
    """Linear layers whose weight is read directly, without calling the layer."""
    return {mixer.get_submodule(name) for mixer in model.mixers for name in mixer.read_weights}


def _all_targets(model: DogeForCausalLM) -> list[str]:
    """Every possible target of adapters, by its name within a decoder layer."""
    read, trained = _read_maps(model), _trained_maps(model)
    maps = {name.partition(".")[2]: x for name, x in _linear_maps(model).items()}
    return [name for name, x in maps.items() if x not in read and x not in trained]


def _trained_maps(model: DogeForCausalLM) -> set[nn.Module]:
    """Linear layers that are trained themselves while others are frozen."""
    if all(p.requires_grad for p in model.parameters()):
        return set()
    return {x for x in _linear_maps(model).values() if x.weight.requires_grad}


def _check_target(model: DogeForCausalLM, target: str) -> None:
    """Raise `ValueError` unless all linear layers with this name can have an adapter."""
    maps = _linear_maps(model)
    found = {name: x for name, x in maps.items() if f".{name}".endswith(f".{target}")}
    if not found or not target:
        known = list(dict.fromkeys(name.partition(".")[2] for name in maps))
        raise ValueError(f"lora.targets: expected names of linear layers, such as {known}, got {target!r}")
    if ignored := [name for name, x in found.items() if x in _read_maps(model)]:
        raise ValueError(
            f"lora.targets: expected linear layers that can have an adapter, got {target!r}, but the attention reads "
            f"the weight of layers.{ignored[0]} directly and would ignore an adapter; leave it out, and train the "
            "weight itself with train_only selection or attention"
        )
    if trained := [name for name, x in found.items() if x in _trained_maps(model)]:
        raise ValueError(
            f"lora.targets: expected linear layers that train_only freezes, got {target!r}, but train_only already "
            f"trains layers.{trained[0]}; leave it out, or change train_only"
        )
