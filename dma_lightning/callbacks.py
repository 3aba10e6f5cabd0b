"""Callbacks of our own; everything else in the configs is Lightning's."""

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_only


class FitReport(pl.Callback):
    """Prints how far the validation metric came, and where checkpoint and logs are.

    Needs `trainer.num_sanity_val_steps: -1`, so that the whole validation split is also evaluated before training.

    Args:
        metric: name of a logged validation metric.
    """

    def __init__(self, metric: str = "val/loss") -> None:
        self.metric = metric
        self.start: float | None = None

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        value = trainer.callback_metrics.get(self.metric)
        self.start = None if value is None else value.item()

    @rank_zero_only
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        end = trainer.callback_metrics.get(self.metric)
        start = "not measured" if self.start is None else f"{self.start:.4f}"
        print(f"\n{self.metric}: {start} at start, {'not measured' if end is None else f'{end:.4f}'} at end")
        if trainer.checkpoint_callback is not None and trainer.checkpoint_callback.last_model_path:
            print(f"checkpoint:  {trainer.checkpoint_callback.last_model_path}")
        if trainer.log_dir is not None:
            print(f"TensorBoard: tensorboard --logdir {trainer.log_dir}")
