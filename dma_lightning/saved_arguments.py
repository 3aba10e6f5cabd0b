"""The arguments of model and data that a checkpoint holds, as plain values of known fields: data from a stranger.

No class that a checkpoint names is imported, and no file that it names is used, unless that is the user's own.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, TypedDict, get_type_hints

import lightning.pytorch as pl
import yaml

import dma_lightning.data
from dma_lightning.checkpoint_files import local_checkpoint, read_checkpoint
from dma_lightning.data import SequenceDataModule, TextDataModule
from dma_lightning.model import ModelConfig
from dma_lightning.reading import as_kind

# Data modules that a checkpoint may name, by the name of their class.
DATA_CLASSES = {
    name: kind
    for name, kind in vars(dma_lightning.data).items()
    if isinstance(kind, type) and issubclass(kind, SequenceDataModule) and kind is not SequenceDataModule
}

_VARIABLE = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class SavedData:
    """What a checkpoint says about its data."""

    class_path: str | None = None
    """Name of the data module's class; None if the checkpoint does not say."""
    kind: type[SequenceDataModule] | None = None
    """That class, if it is one of ours."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Its arguments, without the files below."""
    files: dict[str, str] = field(default_factory=dict)
    """Files and folders that it names and that the run's own configuration does not, by argument."""


class _Data(TypedDict):
    init_args: dict[str, Any]


class _RunConfig(TypedDict):
    data: _Data


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
    return _checked(arguments, kind, f"{path}: hyper_parameters", **get_type_hints(ModelConfig))


def data_arguments(saved: Mapping[str, Any], path: Path, kind: type[SequenceDataModule] | None = None) -> SavedData:
    """Arguments of a data module.

    Args:
        saved: what the checkpoint holds.
        path: of the checkpoint; its folder's parent may have the configuration of the run.
        kind: class of the data module, if it does not depend on the checkpoint.

    Raises:
        ValueError: if one is unknown or has another type, or they are of another class.
    """
    arguments = saved.get(SequenceDataModule.CHECKPOINT_HYPER_PARAMS_KEY, {})
    what = f"{path}: datamodule_hyper_parameters"
    class_path = as_kind(arguments.get("_class_path"), str | None, f"{what}._class_path")
    if kind is not None and class_path is not None and class_path.rpartition(".")[2] != kind.__name__:
        raise ValueError(f"{what}._class_path: expected {kind.__name__}, got {class_path!r}; load it with that class")
    kind = kind or _registered(class_path)
    if kind is None:
        return SavedData(class_path)
    checked = _checked(arguments, kind, what)
    if checked.get("tokenizer") is not None and kind is TextDataModule:
        checked.setdefault("special_tokens", "parse")  # as it was before there was a choice
    files = {name: checked[name] for name in kind.file_arguments if checked.get(name) is not None}
    own = list(_configurations(path)) if files else []
    strange = {name: value for name, value in files.items() if not any(x.get(name) == value for x in own)}
    known = {name: value for name, value in checked.items() if name not in strange}
    return SavedData(class_path, kind, known, strange)


def load_data(
    kind: type[SequenceDataModule], checkpoint_path: str | Path, weights_only: bool | None, changed: dict[str, Any]
) -> SequenceDataModule:
    """See `SequenceDataModule.load_from_checkpoint`; `kind` is the class that it was called of."""
    path = local_checkpoint(checkpoint_path, weights_only)
    saved = read_checkpoint(path)
    found = data_arguments(saved, path, None if kind is SequenceDataModule else kind)
    if found.kind is None:
        raise ValueError(f"{path}: expected data of dma_lightning, got {found.class_path!r}; load it with that class")
    if strange := {name: value for name, value in found.files.items() if name not in changed}:
        raise ValueError(f"{path}: expected files that its run's configuration names, got {strange}; give them here")
    module = found.kind(**found.arguments | changed)
    if (state := saved.get(found.kind.__qualname__)) is not None:
        module.load_state_dict(as_kind(state, dict[str, Any], f"{path}: {found.kind.__qualname__}"))
    return module


def _registered(class_path: str | None) -> type[SequenceDataModule] | None:
    package, _, name = (class_path or "").rpartition(".")
    kind = DATA_CLASSES.get(name)
    return kind if kind and package in ("dma_lightning", "dma_lightning.data", kind.__module__) else None


def _arguments(kind: type) -> Iterator[tuple[bool, dict[str, Any]]]:
    """Arguments of `__init__` with their types, of a class and those above it, each with whether the class takes it."""
    taken = True
    for base in kind.__mro__:
        if "__init__" in vars(base):
            (_, *parameters), hints = signature(base.__init__).parameters.values(), get_type_hints(base.__init__)
            yield taken, {x.name: hints.get(x.name, Any) for x in parameters if x.kind not in _VARIABLE}
            taken = taken and any(x.kind == Parameter.VAR_KEYWORD for x in parameters)


def _checked(arguments: Mapping[str, Any], kind: type, what: str, **more: Any) -> dict[str, Any]:
    """Arguments of their types that a class takes, without what Lightning adds."""
    classes = [(True, more), *_arguments(kind)]
    types = {name: x for _, own in reversed(classes) for name, x in own.items()}
    given = {name: value for name, value in arguments.items() if name not in ("_instantiator", "_class_path")}
    if unknown := sorted(given.keys() - types.keys()):
        raise ValueError(
            f"{what}: expected fields that this version knows, got {unknown}; the checkpoint is probably of a newer "
            "version, so update dma-lightning"
        )
    checked = {name: as_kind(value, types[name], f"{what}.{name}") for name, value in given.items()}
    return {name: value for name, value in checked.items() if any(taken and name in own for taken, own in classes)}


def _configurations(checkpoint: Path) -> Iterator[dict[str, Any]]:
    """Arguments of the data in the configurations that `fit` wrote beside the checkpoints' folder."""
    run = checkpoint.resolve().parent.parent
    for file in (run / "config.yaml", *run.glob("config_from_step_*.yaml")):
        if file.is_file():
            try:
                yield as_kind(yaml.safe_load(file.read_bytes()), _RunConfig, str(file))["data"]["init_args"]
            except (ValueError, OSError, yaml.YAMLError, RecursionError):
                continue  # it confirms nothing
