"""When and where callbacks log: at the steps at which Lightning writes to its loggers, and nowhere else."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter


def is_logging_step(trainer: pl.Trainer) -> bool:
    """Whether the batch that ends now ends an optimizer step whose figures are written; the last one always is.

    For `on_train_batch_end`. Lightning converts its own figures to numbers then and so waits for the device anyway.
    """
    if trainer.fit_loop._should_accumulate():
        return False
    return trainer._logger_connector.should_update_logs or 0 < trainer.max_steps <= trainer.global_step


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done what it was asked to; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def logged_step(trainer: pl.Trainer) -> int:
    """The step under which Lightning writes figures: of training in `on_train_batch_end`, else of a validation."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def tensorboard(trainer: pl.Trainer) -> SummaryWriter | None:
    """What writes pictures, histograms and text; None without TensorBoard, and on other processes than the first."""
    loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    return loggers[0].experiment if loggers and trainer.is_global_zero else None
