"""Data modules made again from the arguments in a checkpoint, which is data from a stranger.

No class that a checkpoint names is imported, and no file that it names is used, unless that is the user's own.
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
    """A data module that takes from a checkpoint what is safe to take.

    A checkpoint may name those of this package that are complete.
    """

    file_arguments: ClassVar[tuple[str, ...]] = ()
    """Arguments that name files or folders, which are not taken from a stranger's checkpoint."""

    @classmethod
    def is_complete(cls) -> bool:
        """Whether the class makes data, and is no base of others alone."""
        return cls.setup is not pl.LightningDataModule.setup

    @classmethod
    def complete_saved(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a checkpoint, with those that it did not have when it was written."""
        return arguments

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # Lightning's other options are none that data has
        cls, checkpoint_path: str | Path, weights_only: bool | None = None, **changed: Any
    ) -> "RestorableDataModule":
        """The data module of a checkpoint, whose arguments are taken as plain values of known fields.

        Args:
            checkpoint_path: a file of this machine.
            weights_only: true or none; nothing else is read.
            **changed: arguments of `__init__` that replace the checkpoint's.

        Raises:
            ValueError: if the file is damaged or could run code; if it holds unknown arguments, those of another class,
                or files that the run's own configuration does not name and that are not given here.
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
    """That class, if it is one of ours."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Its arguments, without the files below."""
    files: dict[str, str] = field(default_factory=dict)
    """Files and folders that it names and that the run's own configuration does not, by argument."""

    def module(self, saved: Mapping[str, Any], path: Path, changed: Mapping[str, Any]) -> RestorableDataModule:
        """The data module; errors are those of `RestorableDataModule.load_from_checkpoint`.

        Args:
            saved: what the checkpoint holds.
            path: of the checkpoint, for messages.
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
    """Arguments of a data module.

    Args:
        saved: what the checkpoint holds.
        path: of the checkpoint; its folder's parent may have the configuration of the run.
        kind: class of the data module, if it does not depend on the checkpoint.

    Raises:
        ValueError: if one is unknown or has another type, or they are of another class.
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
    """The data module of ours that a checkpoint names."""
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
    """Arguments of the data in the configurations that `fit` wrote beside the checkpoints' folder."""
    run = checkpoint.resolve().parent.parent
    for file in (run / "config.yaml", *run.glob("config_from_step_*.yaml")):
        if file.is_file():
            try:
                yield as_kind(yaml.safe_load(file.read_bytes()), _RunConfig, str(file))["data"]["init_args"]
            except (ValueError, OSError, yaml.YAMLError, RecursionError):
                continue  # it confirms nothing
