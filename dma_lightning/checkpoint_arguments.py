"""What `ckpt_path` stands for on the command line, and what a checkpoint says about model and data."""

import argparse
import dataclasses
from pathlib import Path
from pydoc import locate
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import ArgsType

from dma_lightning.checkpoint_files import read_checkpoint
from dma_lightning.data import SequenceDataModule
from dma_lightning.language_model import LanguageModel

# What the data dictates to the model: attribute of the data module, and argument of the model.
LINKS = {
    "vocab_size": "vocab_size",
    "sequence_length": "max_position_embeddings",
    "bytes_per_token": "bytes_per_token",
}

_LIGHTNING_CHECKPOINTS = {"best", "last", "hpc", "registry"}


def checkpoint_argument(args: ArgsType) -> Path | None:
    """The checkpoint that the command line names, unless by a URL or one of Lightning's keywords.

    Raises:
        ValueError: if there is no such file.
    """
    if args is not None and not isinstance(args, list):
        return None
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--ckpt_path")
    return checkpoint_file(parser.parse_known_args(args)[0].ckpt_path)


def checkpoint_file(path: str | None) -> Path | None:
    """The file or folder of a `ckpt_path`, unless it is a URL or one of Lightning's keywords.

    Raises:
        ValueError: if there is no such file.
    """
    if path in (None, "", "null") or "://" in path or path.split(":")[0] in _LIGHTNING_CHECKPOINTS:
        return None
    if not Path(path).exists():
        raise ValueError(f"--ckpt_path: expected an existing checkpoint, got {path!r}; look under runs/")
    return Path(path)


def run_folders(trainer: Namespace) -> list[Path]:
    """Where a trainer puts its checkpoints: the folders that its callbacks name, and its logger's if one names none."""
    callbacks = trainer.get("callbacks") or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    checkpoints = [x for x in callbacks if issubclass(locate(x.class_path), Checkpoint)]
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
    folder = Path(options.get("save_dir") or root).expanduser() / (options.get("project") or options.get("name") or "")
    version = options.get("version")
    return folder if version is None else folder / (version if isinstance(version, str) else f"version_{version}")


def saved_arguments(checkpoint: Path) -> dict[str, Any]:
    """Arguments of model and data that a checkpoint was made with.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        saved = read_checkpoint(checkpoint)
    except ValueError as error:
        raise ValueError(f"ckpt_path {error}; `last` takes the newest whole one") from error
    model = saved.get(LanguageModel.CHECKPOINT_HYPER_PARAMS_KEY, {})
    data = saved.get(SequenceDataModule.CHECKPOINT_HYPER_PARAMS_KEY, {})
    dictated = {"_instantiator", *LINKS.values()}
    defaults: dict[str, Any] = {f"model.{name}": value for name, value in model.items() if name not in dictated}
    if "_class_path" in data:
        init_args = {name: value for name, value in data.items() if not name.startswith("_")}
        defaults["data"] = {"class_path": data["_class_path"], "init_args": init_args}
    return defaults


def check_weights(checkpoint: Path, module: LanguageModel, trains: bool) -> None:
    """Compare the names and shapes of a checkpoint's weights with those of a model; those of a folder are not known.

    Raises:
        ValueError: if they differ, with the options that do; if training is to go on from weights alone.
    """
    saved = read_checkpoint(checkpoint)
    if trains and "optimizer_states" not in saved and "lr_schedulers" not in saved:
        raise ValueError(
            f"ckpt_path: expected a checkpoint of `fit`, got {checkpoint}, which holds weights alone; training cannot "
            "go on from it"
        )
    shapes, expected = (
        {name: weight.shape for name, weight in state.items()}
        for state in (saved.get("state_dict", {}), module.state_dict())
    )
    if not shapes or shapes == expected:
        return
    options = saved.get(LanguageModel.CHECKPOINT_HYPER_PARAMS_KEY, {})
    found = dataclasses.asdict(module.model.config)
    differ = [f"{x} {found[x]!r} instead of {was!r}" for x, was in options.items() if x in found and found[x] != was]
    raise ValueError(
        f"ckpt_path: expected a model with the weights of {checkpoint}, got one with "
        f"{' and '.join(differ) or 'others'}; leave these as they were, or begin a run of its own"
    )
