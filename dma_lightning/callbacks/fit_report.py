"""A report that is printed at the end of a run."""

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from dma_lightning.trainer_state import is_last_step


class FitReport(pl.Callback):
    """Prints how far a validation metric came, and where checkpoint and logs are.

    Training ends with a validation, and so with a checkpoint, even if `trainer.max_steps` is not a multiple of the
    validation interval. The metric at the start needs `trainer.num_sanity_val_steps: -1`.

    Args:
        metric: name of a logged validation metric.

    Raises:
        ValueError: after the first validation, if there is no such metric.
    """

    def __init__(self, metric: str = "val/loss") -> None:
        self.metric = metric
        self.start: float | None = None
        self.trained = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.metric not in trainer.callback_metrics:
            known = [name for name in trainer.callback_metrics if name.startswith("val/")]
            raise ValueError(f"metric: expected one of {known}, got {self.metric!r}; set fit_report.metric to one")

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        value = trainer.callback_metrics.get(self.metric)
        if value is not None and trainer.num_sanity_val_steps == float("inf"):  # the whole split, not a few batches
            self.start = value.item()

    def on_train_batch_start(self, *_: object) -> None:
        self.trained = True

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if is_last_step(trainer):
            trainer.should_stop = True  # it stops anyway, but when asked to, Lightning validates first

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        if not self.trained:
            print(
                f"\nnothing to do: {trainer.global_step} of {trainer.max_steps} steps are done; raise trainer.max_steps"
            )
            return
        end = trainer.callback_metrics.get(self.metric)
        start = "not measured" if self.start is None else f"{self.start:.4f}"
        print(f"\n{self.metric}: {start} at start, {'not measured' if end is None else f'{end:.4f}'} at end")
        checkpoints = trainer.checkpoint_callback
        if isinstance(checkpoints, ModelCheckpoint) and (
            path := checkpoints.last_model_path or checkpoints.best_model_path
        ):
            print(f"checkpoint:  {path}")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                print(f"TensorBoard: tensorboard --logdir {logger.log_dir}")
