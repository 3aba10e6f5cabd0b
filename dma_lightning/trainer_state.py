"""Where a trainer stands: the one room for what Lightning keeps to itself."""

import lightning.pytorch as pl


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


def logged_step(trainer: pl.Trainer) -> int:
    """The step under which Lightning writes figures: of training in `on_train_batch_end`, else of a validation."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped
