"""The folder of a run, where its configuration stands, and checkpoints below it; and how no run gets another's."""

import os
from itertools import count
from pathlib import Path

import lightning.pytorch as pl
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from dma_lightning.trainer_state import given_version, log_into_version

CONFIG = "config.yaml"
_OF_FIGURES = "metrics.csv"  # which Lightning's CSVLogger deletes as it begins
_OF_RUNS = (CONFIG, _OF_FIGURES, "checkpoints")


def run_folder(trainer: pl.Trainer) -> str:
    """Where `ModelCheckpoint` makes its folder `checkpoints`; a collective call, once the loggers have begun.

    With TensorBoard's and CSV's loggers it is the folder of the first one, without a logger `default_root_dir`. Others
    keep their files elsewhere: then it is `<save_dir>/<name>/<version>`, of Weights & Biases with the project as the
    name and the id of its run as the version.
    """
    if not trainer.loggers or isinstance(trainer.loggers[0], TensorBoardLogger | CSVLogger):
        return os.fspath(trainer.log_dir or ".")
    logger = trainer.loggers[0]
    root = trainer.default_root_dir if logger.save_dir is None else logger.save_dir
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    folder: str = trainer.strategy.broadcast(os.path.join(root, str(logger.name), version))  # noqa: PTH118  # or a URL
    return folder


def claim_folder(trainer: pl.Trainer, goes_on: bool, checkpoint: Path | None = None) -> tuple[str, bool]:
    """The folder that a run gets, for its checkpoints, too; a collective call, before their callbacks are set up.

    It is that of `run_folder`, unless that has the configuration of another run and the logger has no versions.

    Args:
        trainer: of the run.
        goes_on: whether the run was asked to go on with the one that is there.
        checkpoint: which it goes on from, if there is one.

    Returns:
        The folder, and whether it has a configuration that is of an earlier part of this run.

    Raises:
        ValueError: if it has one of another run, and the logger has versions.
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
    """Before a logger begins: let it write below the place that it was given, if that has files of another run.

    TensorBoard's files stand side by side, so that a run which goes on may add to them; CSV's do not.

    Args:
        logger: that of a run to come. Those that count their versions, or keep their files elsewhere, stay as they are.
        goes_on: whether the run was asked to go on with the one that is there.

    Raises:
        ValueError: if a version that is named has files that would be deleted, and the run does not go on with it.
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
    """What is wrong with a folder that a run shall have, and what to do."""
    return ValueError(
        f"{Path(folder, file)}: expected none of another run, got one; name another version of the logger (without "
        "one, another trainer.default_root_dir), go on by `fit --ckpt_path last`, or move it away"
    )
