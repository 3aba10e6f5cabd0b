"""The folder of a run, with its configuration and checkpoints, and the rules that keep other runs out of it."""

import os
from itertools import count
from pathlib import Path

import lightning.pytorch as pl
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from dma_lightning.trainer_state import given_version, log_into_version

CONFIG = "config.yaml"
_OF_FIGURES = "metrics.csv"  # Lightning's CSVLogger deletes it when it starts
_OF_RUNS = (CONFIG, _OF_FIGURES, "checkpoints")


def run_folder(trainer: pl.Trainer) -> str:
    """The folder in which `ModelCheckpoint` makes its folder `checkpoints`; a collective call, after loggers start.

    With a TensorBoard or CSV logger first, it is that logger's folder; without a logger, `default_root_dir`. Other
    loggers keep their files elsewhere, so the folder is `<save_dir>/<name>/<version>`; for Weights & Biases, name and
    version are the project and the id of its run.
    """
    if not trainer.loggers or isinstance(trainer.loggers[0], TensorBoardLogger | CSVLogger):
        return os.fspath(trainer.log_dir or ".")
    logger = trainer.loggers[0]
    root = trainer.default_root_dir if logger.save_dir is None else logger.save_dir
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    folder: str = trainer.strategy.broadcast(os.path.join(root, str(logger.name), version))  # noqa: PTH118  # or a URL
    return folder


def claim_folder(trainer: pl.Trainer, goes_on: bool, checkpoint: Path | None = None) -> tuple[str, bool]:
    """Choose the folder of a run and its checkpoints; a collective call, before checkpoint callbacks are set up.

    It is the folder of `run_folder`. But if that holds the configuration of another run, and the logger has no
    versions, it is a new folder `version_<number>` below it.

    Args:
        trainer: the run's trainer.
        goes_on: whether the user asked to resume the run in the folder.
        checkpoint: the checkpoint to resume from, if any.

    Returns:
        The folder, and whether it holds a configuration from an earlier part of this run.

    Raises:
        ValueError: if it holds the configuration of another run, and the logger has versions.
    """
    folder = run_folder(trainer)
    files = get_filesystem(folder)
    if not trainer.strategy.broadcast(files.isfile(f"{folder}/{CONFIG}")):
        return folder, False
    first = trainer.loggers[0] if trainer.loggers else None
    numbered: bool = trainer.strategy.broadcast(first is None or first.version not in (None, ""))
    was_elsewhere = checkpoint is not None and checkpoint.resolve().parents[1] != Path(folder).resolve()
    if goes_on and (numbered or not was_elsewhere):
        return folder, True
    if numbered:
        raise another_run(folder)
    below = (f"{folder}/version_{number}" for number in count())
    folder = trainer.strategy.broadcast(next(x for x in below if not files.exists(x)))
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
            callback.dirpath = f"{folder}/checkpoints"
    return folder, False


def keep_off_other_runs(logger: Logger, goes_on: bool) -> None:
    """Before a logger starts: move it to a subfolder if its place holds files of another run.

    Resumed runs may add TensorBoard files next to the old ones, but CSV files would be overwritten.

    Args:
        logger: the logger. If it numbers its versions or keeps its files elsewhere, it stays as it is.
        goes_on: whether the user asked to resume the run in the folder.

    Raises:
        ValueError: if a named version has files that would be deleted, and the run does not resume it.
    """
    if not isinstance(logger, TensorBoardLogger | CSVLogger) or given_version(logger) is None:
        return
    version, place, is_csv = given_version(logger), Path(logger.log_dir), isinstance(logger, CSVLogger)
    taken = [name for name in ((_OF_FIGURES,) if goes_on else _OF_RUNS) if (place / name).exists()]
    if not taken or (goes_on and not is_csv):
        return
    if version == "" or goes_on:
        named = version if isinstance(version, str) else f"version_{version}"
        for number in count():
            log_into_version(logger, f"{named}/version_{number}" if named else number)
            if not Path(logger.log_dir).exists():
                return
    if is_csv:
        raise another_run(place, taken[0])


def another_run(folder: str | Path, file: str = CONFIG) -> ValueError:
    """The error for a folder that holds another run, and what to do about it."""
    return ValueError(
        f"{Path(folder, file)}: expected no file of another run, got one; name another version of the logger (without "
        "one, another trainer.default_root_dir), resume with `fit --ckpt_path last`, or move it away"
    )
