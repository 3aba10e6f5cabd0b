"""The checkpoint that `ckpt_path` names on the command line, and its arguments of model and data."""

import argparse
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from pydoc import locate
from typing import Any, cast

from jsonargparse import Namespace
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import ArgsType
from lightning.pytorch.loggers import WandbLogger

from dma_lightning.checkpoints import ResumableCheckpoint
from dma_lightning.checkpoints.weights import (
    EMBEDDING,
    Weights,
    check_layers,
    compare_weights,
    layers_in,
    model_weights,
)
from dma_lightning.config import ModelConfig
from dma_lightning.data import SequenceDataModule
from dma_lightning.language_model import LanguageModel
from dma_lightning.optimizers import check_same_optimizer
from dma_lightning.saved_run import SavedRun

# Arguments that the model takes from the data: attribute of the data module, argument of the model.
LINKS = {
    "vocab_size": "vocab_size",
    "sequence_length": "max_position_embeddings",
    "bytes_per_token": "bytes_per_token",
}

_NOT_TAKEN = "(not taken from the checkpoint)"  # default of an argument that the user must give

_LIGHTNING_CHECKPOINTS = {"best", "last", "hpc", "registry"}


class _UnknownData(SequenceDataModule):
    """Placeholder for a data class named in a checkpoint, until the user names one; keeps no arguments."""

    def __init__(self) -> None:
        raise NotImplementedError


def open_argument(args: ArgsType) -> SavedRun | None:
    """Open the checkpoint that the command line names; None for a URL or one of Lightning's keywords.

    Raises:
        ValueError: if the file does not exist or cannot be read.
    """
    if args is not None and not isinstance(args, list):
        return None
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--ckpt_path")
    return open_ckpt_path(parser.parse_known_args(args)[0].ckpt_path)


def printed_init_from(args: ArgsType) -> str | None:
    """The `model.init_from` of a command line with `--print_config`; None without either."""
    if args is not None and not isinstance(args, list):
        return None
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model.init_from", dest="init_from")
    parser.add_argument("--print_config", nargs="?", const="", default=None)
    known = parser.parse_known_args(args)[0]
    return None if known.print_config is None else known.init_from


def open_ckpt_path(path: str | None) -> SavedRun | None:
    """Open the file or folder of a `ckpt_path`; None for a URL or one of Lightning's keywords.

    Raises:
        ValueError: if the file does not exist or cannot be read.
    """
    path = path and path.removeprefix("file://")
    if path in (None, "", "null") or "://" in path or path.split(":")[0] in _LIGHTNING_CHECKPOINTS:
        return None
    if not Path(path).exists():
        raise ValueError(f"--ckpt_path: expected an existing checkpoint, got {path!r}; look under runs/")
    try:
        return SavedRun.open(Path(path))
    except ValueError as error:
        raise ValueError(f"ckpt_path {error}; `last` takes the newest whole one") from error


def run_folders(config: Namespace) -> list[Path]:
    """Folders where a run saves checkpoints: its callbacks' folders, and its logger's if a callback names none."""
    trainer = config.trainer
    callbacks = trainer.get("callbacks") or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    # jsonargparse has already found these classes.
    kinds = [cast("type", locate(x.class_path)) for x in callbacks]
    checkpoints = [x for x, kind in zip(callbacks, kinds, strict=True) if issubclass(kind, Checkpoint)]
    if config.get("checkpoint") is not None and not any(issubclass(kind, ResumableCheckpoint) for kind in kinds):
        checkpoints.append(config.checkpoint)
    chosen = {x.get("init_args", {}).get("dirpath") for x in checkpoints} or {None}
    folders = [Path(folder).expanduser() for folder in sorted(chosen - {None})]
    return folders + [_logger_folder(trainer)] * (None in chosen)


def _logger_folder(trainer: Namespace) -> Path:
    loggers = trainer.get("logger")
    logger = loggers[0] if isinstance(loggers, list) and loggers else loggers
    root = Path(trainer.get("default_root_dir") or ".").expanduser()
    if not isinstance(logger, Namespace):
        return root / ("checkpoints" if logger is False else "lightning_logs")
    options = logger.get("init_args") or Namespace()
    root, name, version = (
        options.get("save_dir") or options.get("dir") or root,
        options.get("name"),
        options.get("version"),
    )
    if issubclass(cast("type", locate(logger.class_path)), WandbLogger):  # its name does not set the folder
        name = options.get("project") or os.environ.get("WANDB_PROJECT", "lightning_logs")
        version = version or options.get("id")
    folder = Path(root).expanduser() / (name or "")
    return folder if version is None else folder / (version if isinstance(version, str) else f"version_{version}")


def saved_defaults(saved: SavedRun) -> dict[str, Any]:
    """Defaults for the command line, from a checkpoint.

    Raises:
        ValueError: if the checkpoint has arguments that are unknown or have the wrong type.
    """
    model, data = saved.model_arguments(LanguageModel), saved.data
    defaults: dict[str, Any] = {f"model.{name}": x for name, x in model.items() if name not in LINKS.values()}
    if data.kind is not None:
        init_args = data.arguments | dict.fromkeys(data.files, _NOT_TAKEN)
        defaults["data"] = {"class_path": f"{data.kind.__module__}.{data.kind.__qualname__}", "init_args": init_args}
    elif data.class_path is not None:
        defaults["data"] = {"class_path": f"{__name__}.{_UnknownData.__name__}"}
    return defaults


def check_data(data: Namespace | None, saved: SavedRun) -> None:
    """Check that the user named the class and files that are not taken from a checkpoint.

    Args:
        data: the parsed configuration of the data.
        saved: the checkpoint.

    Raises:
        ValueError: if a class or file is missing; the message names the flag to add.
    """
    if data is None:
        return
    if data.class_path.endswith(f".{_UnknownData.__name__}"):
        raise ValueError(
            f"data: expected a class that you name, since {saved.path} names {saved.data.class_path!r} and checkpoints "
            "import no code; add --data with the class, and its arguments"
        )
    for name, value in data.get("init_args", Namespace()).items():
        if value == _NOT_TAKEN:
            raise ValueError(
                f"data.{name}: expected a path that you name, since {saved.path} names {saved.data.files.get(name)!r} "
                f"and its run's config.yaml does not; add --data.{name}"
            )


def check_holds_training(saved: SavedRun) -> None:
    """Refuse to resume training from weights alone.

    Raises:
        ValueError: if the checkpoint holds only weights.
    """
    if not saved.holds_training:
        raise ValueError(
            f"ckpt_path: expected a checkpoint of `fit`, got {saved.path}, which holds only weights; to start a "
            "new run from them, use --model.init_from"
        )


def check_optimizer(saved: SavedRun, arguments: Mapping[str, Any]) -> None:
    """Refuse to resume training with an optimizer other than the checkpoint's.

    Args:
        saved: the checkpoint.
        arguments: arguments of the model.

    Raises:
        ValueError: if the optimizers differ.
    """
    was = saved.model_arguments(LanguageModel).get("optimizer", "adamw")
    check_same_optimizer(was, arguments.get("optimizer", "adamw"), f"ckpt_path {saved.path}")


def check_weights(saved: SavedRun, arguments: Mapping[str, Any]) -> None:
    """Compare the names and shapes of a checkpoint's weights with those of a model before building it.

    Args:
        saved: the checkpoint.
        arguments: arguments of the model; a missing vocab_size is taken from the checkpoint.

    Raises:
        ValueError: if they differ; the message names the options that do.
    """
    if not saved.weights:
        return
    if EMBEDDING in saved.weights:
        arguments = {"vocab_size": saved.weights[EMBEDDING].shape[0], **arguments}
    was = saved.model_arguments(LanguageModel)
    _check_layers(saved, was, arguments)
    expected = _expected_weights(saved, arguments)
    if expected == saved.weights:
        return
    differ = _different_options(was, arguments)
    if not differ:
        compare_weights(saved.weights, expected, saved.path, strict=True)
    raise ValueError(
        f"ckpt_path: expected a model with the weights of {saved.path}, got one with {' and '.join(differ)}; leave "
        "these as they were, or start a separate run"
    )


def _check_layers(saved: SavedRun, was: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Compare the number of layers in a checkpoint's arguments with its weights, unless the user gave another number.

    Raises:
        ValueError: if they differ.
    """
    layers = was.get("num_hidden_layers", ModelConfig.num_hidden_layers)
    if arguments["num_hidden_layers"] == layers:
        check_layers(saved.weights, layers, saved.path)


def _expected_weights(saved: SavedRun, arguments: Mapping[str, Any]) -> Weights:
    """Weights of a model with these arguments; empty if its number of layers differs from the checkpoint's."""
    fits = arguments["num_hidden_layers"] == layers_in(saved.weights)
    return model_weights(LanguageModel, arguments) if fits else {}


def _different_options(was: Mapping[str, Any], arguments: Mapping[str, Any]) -> list[str]:
    """Describe the model options that differ from the checkpoint's."""
    known = {x.name for x in dataclasses.fields(ModelConfig)} & arguments.keys()
    pairs = {x: (_listed(arguments[x]), _listed(old)) for x, old in was.items() if x in known}
    return [f"{x} {new!r} instead of {old!r}" for x, (new, old) in pairs.items() if new != old]


def _listed(value: Any) -> Any:
    """A configuration value; files have lists where arguments have tuples."""
    return list(value) if isinstance(value, tuple) else value
