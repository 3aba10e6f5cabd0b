"""Rebuilds data modules from the arguments in a checkpoint, which a stranger may have written.

No class that a checkpoint names is imported. No file that it names is used unless the user's own configuration names
it too.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypedDict

import lightning.pytorch as pl
import yaml

from dma_lightning.checkpoints.arguments import checked_arguments
from dma_lightning.checkpoints.io import local_checkpoint, read_checkpoint
from dma_lightning.files.reading import as_kind
from dma_lightning.plain_values import PlainHyperparameters
from dma_lightning.trainer_state import CLASS_PATH

_PACKAGE = __name__.rpartition(".")[0]


class RestorableDataModule(PlainHyperparameters, pl.LightningDataModule):
    """A data module that takes from a checkpoint only what is safe to take.

    A checkpoint may name any complete data module of this package.
    """

    file_arguments: ClassVar[tuple[str, ...]] = ()
    """Arguments that name files or folders; they are not taken from a stranger's checkpoint."""

    @classmethod
    def is_complete(cls) -> bool:
        """Whether the class makes data itself and is not only a base of others."""
        return cls.setup is not pl.LightningDataModule.setup

    @classmethod
    def complete_saved(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a checkpoint, completed with those that did not exist when it was written."""
        return arguments

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # data has none of Lightning's other options
        cls, checkpoint_path: str | Path, weights_only: bool | None = None, **changed: Any
    ) -> "RestorableDataModule":
        """The data module of a checkpoint, whose arguments are read as plain values of known fields.

        Args:
            checkpoint_path: a file on this machine.
            weights_only: must be true or none; false would let a checkpoint run code.
            **changed: arguments of `__init__` that replace the checkpoint's.

        Raises:
            ValueError: if the file is damaged or could run code; or if it holds unknown arguments, arguments of another
                class, or files that neither the run's own configuration nor `changed` names.
        """
        path = local_checkpoint(checkpoint_path, weights_only)
        saved = read_checkpoint(path)
        found = data_arguments(saved, path, cls if cls.is_complete() else None)
        return found.module(saved, path, changed)


@dataclass(frozen=True)
class SavedData:
    """What a checkpoint says about its data."""

    class_path: str | None = None
    """Name of the data module's class; None if the checkpoint does not say."""
    kind: type[RestorableDataModule] | None = None
    """That class, if it belongs to this package."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Its arguments, without the files below."""
    files: dict[str, Any] = field(default_factory=dict)
    """Files, folders, or folders with weights, by argument, that only the checkpoint names, not the run's own
    configuration."""

    def module(self, saved: Mapping[str, Any], path: Path, changed: Mapping[str, Any]) -> RestorableDataModule:
        """The data module; it raises the errors of `RestorableDataModule.load_from_checkpoint`.

        Args:
            saved: what the checkpoint holds.
            path: path of the checkpoint, for messages.
            changed: arguments of `__init__` that replace the checkpoint's.
        """
        if self.kind is None:
            raise ValueError(
                f"{path}: expected data of dma_lightning, got {self.class_path!r}; load it with that class"
            )
        if strange := {name: value for name, value in self.files.items() if name not in changed}:
            raise ValueError(
                f"{path}: expected files that its run's configuration names, got {strange}; give them here"
            )
        module = self.kind(**self.arguments | dict(changed))
        if (state := saved.get(self.kind.__qualname__)) is not None:
            module.load_state_dict(as_kind(state, dict[str, Any], f"{path}: {self.kind.__qualname__}"))
        return module


class _Data(TypedDict):
    init_args: dict[str, Any]


class _RunConfig(TypedDict):
    data: _Data


def data_arguments(saved: Mapping[str, Any], path: Path, kind: type[RestorableDataModule] | None = None) -> SavedData:
    """The arguments of a checkpoint's data module.

    Args:
        saved: what the checkpoint holds.
        path: path of the checkpoint; its folder's parent may hold the configuration of the run.
        kind: class of the data module. Default: the class that the checkpoint names.

    Raises:
        ValueError: if an argument is unknown or has another type, or if they belong to another class.
    """
    arguments = saved.get(RestorableDataModule.CHECKPOINT_HYPER_PARAMS_KEY, {})
    what = f"{path}: datamodule_hyper_parameters"
    class_path: str | None = as_kind(arguments.get(CLASS_PATH), str | None, f"{what}.{CLASS_PATH}")
    if kind is not None and class_path is not None and class_path.rpartition(".")[2] != kind.__name__:
        raise ValueError(f"{what}.{CLASS_PATH}: expected {kind.__name__}, got {class_path!r}; load it with that class")
    kind = kind or _registered(class_path)
    if kind is None:
        return SavedData(class_path)
    checked = kind.complete_saved(checked_arguments(arguments, kind, what))
    files = {name: checked[name] for name in kind.file_arguments if checked.get(name) is not None}
    own = list(_configurations(path)) if files else []
    strange = {name: value for name, value in files.items() if not any(x.get(name) == value for x in own)}
    known = {name: value for name, value in checked.items() if name not in strange}
    return SavedData(class_path, kind, known, strange)


def _registered(class_path: str | None) -> type[RestorableDataModule] | None:
    """The data module of this package that a checkpoint names."""
    package, _, name = (class_path or "").rpartition(".")
    for kind in _subclasses(RestorableDataModule):
        home = kind.__module__
        ours = home.startswith(f"{_PACKAGE}.") and kind.is_complete()
        if ours and kind.__name__ == name and package in ("dma_lightning", _PACKAGE, home):
            return kind
    return None


def _subclasses(kind: type[RestorableDataModule]) -> Iterator[type[RestorableDataModule]]:
    for below in kind.__subclasses__():
        yield below
        yield from _subclasses(below)


def _configurations(checkpoint: Path) -> Iterator[dict[str, Any]]:
    """The data arguments of the configurations that `fit` wrote next to the folder of checkpoints."""
    run = checkpoint.resolve().parent.parent
    for file in (run / "config.yaml", *run.glob("config_from_step_*.yaml")):
        if file.is_file():
            try:
                yield as_kind(yaml.safe_load(file.read_bytes()), _RunConfig, str(file))["data"]["init_args"]
            except (ValueError, OSError, yaml.YAMLError, RecursionError):
                continue  # it confirms nothing
