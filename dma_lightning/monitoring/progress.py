"""Progress of a run: a bar in a terminal, lines elsewhere."""

import math
import sys
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar

from dma_lightning.monitoring.summary import duration, total_steps
from dma_lightning.trainer_state import accumulates, is_last_step, is_logging_step

_STEPS_OF_A_LINE = 20  # steps per line, so that 1,000 steps have at most 50 lines
_LINES_OF_A_RUN = 50  # maximum number of lines of a shorter run


class ProgressBar(TQDMProgressBar):
    """Lightning's bar, with correct counts under accumulation and in resumed runs; lines where there is no terminal.

    The bar shows the epoch's number and length, and the rate, even if a run resumes within an epoch. Into a file or a
    pipe, training instead writes lines at logging steps, with step, loss, tokens/s and the time left at the pace so
    far, validations included. Lines are at least 20 steps apart; a run of fewer than 1,000 steps has at most about 50.
    Every validation has a line with its metrics.
    """

    _done_before = 0  # batches of the epoch that another process has trained on

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._started: tuple[float, int] | None = None  # when this process finished its first step, and that step
        self._next_line = 0

    @property
    def is_enabled(self) -> bool:
        """Whether there is a bar."""
        return super().is_enabled and _is_shown_as_it_changes()

    @property
    def _writes_lines(self) -> bool:
        return super().is_enabled and not _is_shown_as_it_changes()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar, or normally if there is none."""
        if self._writes_lines:
            print(*args, **{"flush": True} | kwargs)  # so that it reaches the file now
        else:
            super().print(*args, **kwargs)

    def on_train_start(self, trainer: pl.Trainer, *args: Any) -> None:
        super().on_train_start(trainer, *args)
        self._done_before = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if self._done_before:
            self.on_train_epoch_start(trainer)  # Lightning does so only for new epochs
            self.train_progress_bar.initial = self._done_before
            self._done_before = 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        if not self._writes_lines or accumulates(trainer):
            return
        step = trainer.global_step
        if self._started is None:  # after the first step, which may compile layers
            self._started = time.perf_counter(), step
        if is_logging_step(trainer) and (step >= self._next_line or is_last_step(trainer)):
            self._next_line = step + _steps_between(total_steps(trainer))
            self.print(", ".join([_step(trainer), *self._figures(trainer), *self._time_left(trainer)]))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        whole = not trainer.sanity_checking or math.isinf(trainer.num_sanity_val_steps)
        if self._writes_lines and trainer.state.fn == "fit" and whole:
            # Groups, such as needles at one depth, would add dozens of figures.
            found = {name: x for name, x in trainer.callback_metrics.items() if name.startswith("val/")}
            shown = [f"{name} {x:.4g}" for name, x in found.items() if name.count("/") == 1]
            self.print(f"{_step(trainer)}, validation: {', '.join(shown)}")

    @property
    def total_train_batches(self) -> int | float:
        """Batches until the epoch or the run ends (Lightning's version mistakes remaining steps for batches)."""
        trainer = self.trainer
        if trainer.max_steps < 0:
            return trainer.num_training_batches
        left = (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches
        return min(trainer.num_training_batches, self._done_before + left)

    @staticmethod
    def _figures(trainer: pl.Trainer) -> list[str]:
        """The available figures: without `SpeedMonitor`, only the loss."""
        loss, speed = trainer.callback_metrics.get("train/loss"), trainer.progress_bar_metrics.get("tokens/s")
        figures = [] if loss is None else [f"loss {loss.item():.4g}"]
        return figures if speed is None else [*figures, f"{speed:,.0f} tokens/s"]

    def _time_left(self, trainer: pl.Trainer) -> list[str]:
        total = total_steps(trainer)
        assert self._started is not None
        when, first = self._started
        made = trainer.global_step - first
        if total is None or not made:
            return []
        return [f"{duration((time.perf_counter() - when) / made * (total - trainer.global_step))} left"]


def _is_shown_as_it_changes() -> bool:
    """Whether somebody is watching: in a terminal or a notebook."""
    return sys.stdout.isatty() or hasattr(sys, "ps1")


def _steps_between(total: int | None) -> int:
    """The minimum number of steps from one line to the next."""
    return _STEPS_OF_A_LINE if total is None else min(_STEPS_OF_A_LINE, math.ceil(total / _LINES_OF_A_RUN))


def _step(trainer: pl.Trainer) -> str:
    total = None if trainer.sanity_checking else total_steps(trainer)  # which may load the training data
    return f"step {trainer.global_step:,}" + ("" if total is None else f" of {total:,}")
