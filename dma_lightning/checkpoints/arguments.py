"""Arguments that a checkpoint holds, as plain values of known fields: data from a stranger."""

from collections.abc import Iterator, Mapping
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, get_type_hints

import lightning.pytorch as pl

from dma_lightning.config import ModelConfig
from dma_lightning.files.reading import as_kind
from dma_lightning.trainer_state import ADDED_HPARAMS

_VARIABLE = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


def model_arguments(saved: Mapping[str, Any], path: Path, kind: type[pl.LightningModule]) -> dict[str, Any]:
    """Arguments of a model.

    Args:
        saved: what the checkpoint holds.
        path: of the checkpoint, for messages.
        kind: class of the model, a `LanguageModel`.

    Raises:
        ValueError: if one is unknown or has another type.
    """
    arguments = saved.get(kind.CHECKPOINT_HYPER_PARAMS_KEY, {})
    arguments = {name: x for name, x in arguments.items() if name != "init_from"}  # it has weights of its own
    return checked_arguments(arguments, kind, f"{path}: hyper_parameters", **get_type_hints(ModelConfig))


def checked_arguments(arguments: Mapping[str, Any], kind: type, what: str, **more: Any) -> dict[str, Any]:
    """Arguments of their types that a class takes, without what Lightning adds.

    Args:
        arguments: what a checkpoint holds.
        kind: the class.
        what: where they stand, for messages.
        **more: types of arguments that the class takes besides those of its `__init__`.

    Raises:
        ValueError: if one is unknown or has another type.
    """
    classes = [(True, more), *_arguments(kind)]
    types = {name: x for _, own in reversed(classes) for name, x in own.items()}
    given = {name: value for name, value in arguments.items() if name not in ADDED_HPARAMS}
    if unknown := sorted(given.keys() - types.keys()):
        raise ValueError(
            f"{what}: expected fields that this version knows, got {unknown}; the checkpoint is probably of a newer "
            "version, so update dma-lightning"
        )
    checked = {name: as_kind(value, types[name], f"{what}.{name}") for name, value in given.items()}
    return {name: value for name, value in checked.items() if any(taken and name in own for taken, own in classes)}


def _arguments(kind: type) -> Iterator[tuple[bool, dict[str, Any]]]:
    """Arguments of `__init__` with their types, of a class and those above it, each with whether the class takes it."""
    taken = True
    for base in kind.__mro__:
        if init := vars(base).get("__init__"):
            (_, *parameters), hints = signature(init).parameters.values(), get_type_hints(init)
            yield taken, {x.name: hints.get(x.name, Any) for x in parameters if x.kind not in _VARIABLE}
            taken = taken and any(x.kind == Parameter.VAR_KEYWORD for x in parameters)
