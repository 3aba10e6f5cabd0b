"""When and where callbacks log: at the steps at which Lightning writes to its loggers, and nowhere else."""

from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def is_logging_step(trainer: pl.Trainer, before_step: bool = False) -> bool:
    """Whether a batch ends an optimizer step whose figures are written; the last one of `max_steps` always is.

    Lightning converts its own figures to numbers then and so waits for the device anyway.

    Args:
        trainer: while it trains.
        before_step: whether the step is still to be made, as in `training_step`; in `on_train_batch_end` it is done.
    """
    if trainer.fit_loop._should_accumulate():
        return False
    return trainer._logger_connector.should_update_logs or is_last_step(trainer, before_step)


def is_last_step(trainer: pl.Trainer, before_step: bool = False) -> bool:
    """Whether `max_steps` are made, if there is such a limit; with `before_step`, after the step that is being made."""
    return 0 < trainer.max_steps <= trainer.global_step + before_step


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done what it was asked to; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def logged_step(trainer: pl.Trainer) -> int:
    """The step under which Lightning writes figures: of training in `on_train_batch_end`, else of a validation."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def tensorboard(trainer: pl.Trainer) -> "SummaryWriter | None":
    """What writes pictures, histograms and text; None without TensorBoard, and on other processes than the first."""
    loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    return loggers[0].experiment if loggers and trainer.is_global_zero else None
