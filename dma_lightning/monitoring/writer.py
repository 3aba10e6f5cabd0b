"""Writers of pictures, histograms and texts, for TensorBoard and Weights & Biases."""

import io
from typing import TYPE_CHECKING, Any, Protocol

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_ABLE = (TensorBoardLogger, WandbLogger)
_BINS = 64


class Writer(Protocol):
    """Shows pictures, histograms and texts under a tag and a step."""

    def add_image(self, tag: str, picture: Tensor, step: int) -> None:
        """Show a picture, RGB `[3, height, width]` from 0 to 1."""

    def add_histogram(self, tag: str, values: Tensor, step: int) -> None:
        """Show how finite values of any shape are distributed."""

    def add_text(self, tag: str, text: str, step: int) -> None:
        """Show HTML, made of the few elements that TensorBoard lets through."""


class TensorBoardWriter:
    """Writes to the event files of a logger."""

    def __init__(self, logger: TensorBoardLogger) -> None:
        self.writer: SummaryWriter = logger.experiment

    def add_image(self, tag: str, picture: Tensor, step: int) -> None:
        self.writer.add_image(tag, picture, step)

    def add_histogram(self, tag: str, values: Tensor, step: int) -> None:
        self.writer.add_histogram(tag, values.cpu(), step)

    def add_text(self, tag: str, text: str, step: int) -> None:
        self.writer.add_text(tag, text, step)


class WandbWriter:
    """Writes to a run of Weights & Biases, at the step that its logger uses for figures."""

    def __init__(self, logger: WandbLogger) -> None:
        self.logger = logger

    def add_image(self, tag: str, picture: Tensor, step: int) -> None:
        pixels = (picture.cpu() * 255).round().byte()
        self.logger.log_image(tag, [pixels.permute(1, 2, 0).numpy()], step)

    def add_histogram(self, tag: str, values: Tensor, step: int) -> None:
        import wandb

        counts = np.histogram(values.cpu().numpy(), bins=_BINS)
        figures: dict[str, Any] = {tag: wandb.Histogram(np_histogram=counts)}  # typed as floats, but wandb takes this
        self.logger.log_metrics(figures, step)

    def add_text(self, tag: str, text: str, step: int) -> None:
        import wandb

        page = io.StringIO(text)  # wandb would check whether a plain string names a file
        figures: dict[str, Any] = {tag: wandb.Html(page)}
        self.logger.log_metrics(figures, step)


def writers(trainer: pl.Trainer) -> list[Writer]:
    """The writers of all loggers that show more than numbers; none on processes other than the first."""
    if not trainer.is_global_zero:
        return []
    return [writer for logger in trainer.loggers if (writer := _writer(logger)) is not None]


def can_show(trainer: pl.Trainer) -> bool:
    """Whether there are writers, perhaps in another process."""
    return any(isinstance(logger, _ABLE) for logger in trainer.loggers)


class ShowingMonitor(pl.Callback):
    """Shows pictures, histograms or texts; the first such monitor of a run names what its loggers cannot show."""

    shows: str
    """What it shows in addition to figures, in words."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it undeclared
        monitors = [x for x in callbacks if isinstance(x, ShowingMonitor)]
        unable = [type(logger).__name__ for logger in trainer.loggers if not isinstance(logger, _ABLE)]
        if stage == "fit" and monitors[0] is self and unable:
            left_out = ", ".join(f"{x.shows} of {type(x).__name__}" for x in monitors)
            able = " and ".join(kind.__name__ for kind in _ABLE)
            rank_zero_info(f"{' and '.join(dict.fromkeys(unable))}: cannot show {left_out}; {able} can")


def _writer(logger: Logger) -> Writer | None:
    if isinstance(logger, TensorBoardLogger):
        return TensorBoardWriter(logger)
    return WandbWriter(logger) if isinstance(logger, WandbLogger) else None
