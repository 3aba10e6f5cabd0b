"""A progress bar that counts right with accumulation, and in runs that go on."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar


class ProgressBar(TQDMProgressBar):
    """Lightning's, which has the epoch's number and length, and the rate, also where a run goes on within an epoch."""

    _done_before = 0  # batches of the epoch that another process has made

    def on_train_start(self, trainer: pl.Trainer, *args: Any) -> None:
        super().on_train_start(trainer, *args)
        self._done_before = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if self._done_before:
            self.on_train_epoch_start(trainer)  # Lightning does so for new epochs alone
            self.train_progress_bar.initial = self._done_before
            self._done_before = 0

    @property
    def total_train_batches(self) -> int | float:
        """Batches until the epoch or the run ends (Lightning's takes the steps that are left for batches)."""
        trainer = self.trainer
        if trainer.max_steps < 0:
            return trainer.num_training_batches
        left = (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches
        return min(trainer.num_training_batches, self._done_before + left)
