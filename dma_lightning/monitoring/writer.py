"""What writes pictures, histograms and text."""

from typing import TYPE_CHECKING

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def tensorboard(trainer: pl.Trainer) -> "SummaryWriter | None":
    """What writes pictures, histograms and text; None without TensorBoard, and on other processes than the first."""
    loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    return loggers[0].experiment if loggers and trainer.is_global_zero else None
