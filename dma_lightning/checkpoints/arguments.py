"""Arguments in a checkpoint, read as untrusted data: plain values of known fields."""

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
    """Read a model's arguments from a checkpoint.

    Args:
        saved: content of the checkpoint.
        path: path of the checkpoint, for messages.
        kind: class of the model, a `LanguageModel`.

    Raises:
        ValueError: if an argument is unknown or has the wrong type.
    """
    arguments = saved.get(kind.CHECKPOINT_HYPER_PARAMS_KEY, {})
    arguments = {name: x for name, x in arguments.items() if name != "init_from"}  # the checkpoint has its own weights
    return checked_arguments(arguments, kind, f"{path}: hyper_parameters", **get_type_hints(ModelConfig))


def checked_arguments(arguments: Mapping[str, Any], kind: type, what: str, **more: Any) -> dict[str, Any]:
    """Check the types of a class's saved arguments, and drop those that Lightning adds or the class does not accept.

    Args:
        arguments: the arguments in a checkpoint.
        kind: the class.
        what: where the checkpoint stores them, for messages.
        **more: types of arguments that the class accepts in addition to those of its `__init__`.

    Raises:
        ValueError: if an argument is unknown or has the wrong type.
    """
    classes = [(True, more), *_arguments(kind)]
    types = {name: x for _, own in reversed(classes) for name, x in own.items()}
    given = {name: value for name, value in arguments.items() if name not in ADDED_HPARAMS}
    if unknown := sorted(given.keys() - types.keys()):
        raise ValueError(
            f"{what}: expected fields that this version knows, got {unknown}; the checkpoint is probably from a "
            "newer version, so update dma-lightning"
        )
    checked = {name: as_kind(value, types[name], f"{what}.{name}") for name, value in given.items()}
    return {name: value for name, value in checked.items() if any(taken and name in own for taken, own in classes)}


def _arguments(kind: type) -> Iterator[tuple[bool, dict[str, Any]]]:
    """For a class and each base class: whether the class accepts its `__init__` arguments, and their types by name."""
    taken = True
    for base in kind.__mro__:
        if init := vars(base).get("__init__"):
            (_, *parameters), hints = signature(init).parameters.values(), get_type_hints(init)
            yield taken, {x.name: hints.get(x.name, Any) for x in parameters if x.kind not in _VARIABLE}
            taken = taken and any(x.kind == Parameter.VAR_KEYWORD for x in parameters)
