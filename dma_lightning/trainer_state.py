"""All private names of Lightning that this package uses.

A release of Lightning may change them without notice. `tests/lightning/test_trainer_state.py` runs each function with a
real trainer, compares `OVERRIDDEN` with Lightning, and finds private names that are used anywhere else.
"""

import copy
from traceback import walk_tb
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch.core.saving import _default_map_location
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.trainer.connectors import checkpoint_connector
from torch.optim import Adam

# Private names of Lightning's classes that our classes override, call or set on themselves: methods with their
# parameters, attributes without. The classes are named as text, since importing the command line takes long.
OVERRIDDEN: dict[str, tuple[str, ...]] = {
    "lightning.pytorch.callbacks.ModelCheckpoint": (
        "_every_n_train_steps",
        "_get_metric_interpolated_filepath_name(self, monitor_candidates, trainer, del_filepath)",
        "_last_checkpoint_saved",
        "_last_global_step_saved",
        "_link_checkpoint(trainer, filepath, linkpath)",
        "_monitor_candidates(self, trainer)",
        "_remove_checkpoint(self, trainer, filepath)",
        "_save_checkpoint(self, trainer, filepath)",
        "_save_last_checkpoint(self, trainer, monitor_candidates)",
        "_save_none_monitor_checkpoint(self, trainer, monitor_candidates)",
        "_save_topk_checkpoint(self, trainer, monitor_candidates)",
        "_should_remove_checkpoint(self, trainer, previous, current)",
        "_should_skip_saving_checkpoint(self, trainer)",
    ),
    "lightning.pytorch.cli.LightningCLI": (
        "_get(self, config, key, default)",
        "_parse_ckpt_path(self)",
        "_run_subcommand(self, subcommand)",
        "_subcommand_parsers",
    ),
    "lightning.pytorch.strategies.ModelParallelStrategy": ("_data_parallel_size", "_save_distributed_checkpoint"),
}

CLASS_PATH = "_class_path"  # the hyperparameter under which the command line saves the class of a module
ADDED_HPARAMS = (CLASS_PATH, "_instantiator")  # hyperparameters that the user did not give


def accumulates(trainer: pl.Trainer) -> bool:
    """Whether the optimizer step needs more batches after the current or last one."""
    return trainer.fit_loop._should_accumulate()


def validates_next(trainer: pl.Trainer) -> bool:
    """In `on_train_batch_end`: whether a validation follows."""
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None  # the fetcher of training batches
    return trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def is_logging_step(trainer: pl.Trainer, before_step: bool = False) -> bool:
    """Whether a batch ends an optimizer step whose metrics are logged, as those of the last of `max_steps` always are.

    At such steps Lightning converts its own metrics to numbers and so waits for the device anyway.

    Args:
        trainer: while it trains.
        before_step: whether the optimizer step is still to come, as in `training_step`; in `on_train_batch_end` it is
            done.
    """
    return not accumulates(trainer) and is_of_logging_step(trainer, before_step)


def is_of_logging_step(trainer: pl.Trainer, before_step: bool = True) -> bool:
    """Whether a batch belongs to such a step, even if it does not end it; arguments as in `is_logging_step`."""
    return trainer._logger_connector.should_update_logs or is_last_step(trainer, before_step)


def is_last_step(trainer: pl.Trainer, before_step: bool = False) -> bool:
    """Whether all `max_steps` are done, if there is a limit; with `before_step`, after the current step."""
    return 0 < trainer.max_steps <= trainer.global_step + before_step


def logged_step(trainer: pl.Trainer) -> int:
    """The step number under which Lightning logs training, in `on_train_batch_end`, and otherwise a validation."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def set_logged_step(trainer: pl.Trainer) -> None:
    """In `on_train_batch_start`: log under the number of optimizer steps that are done.

    Lightning keeps a separate count. That count is one too low after resuming at a validation that this run would not
    have made there, such as the last one of a shorter run.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def write_logs(trainer: pl.Trainer) -> None:
    """In `on_train_batch_end` of a run that ends there: write this step's logs, as Lightning does after the hook."""
    trainer._logger_connector.on_batch_end()
    trainer._logger_connector.update_train_step_metrics()


def has_trainer(module: pl.LightningModule) -> bool:
    """Whether a trainer runs the module; `module.trainer` raises if none does."""
    return module._trainer is not None


def set_initial_hparams(module: pl.LightningModule | pl.LightningDataModule) -> None:
    """Give loggers the hyperparameters as they are now."""
    module._hparams_initial = copy.deepcopy(module.hparams)  # type: ignore[union-attr]  # Lightning declares it nowhere


def let_clip_gradients(optimizer: Adam) -> None:
    """Allow gradient clipping with a fused Adam in 16-mixed and bf16-mixed; for runs that do not scale gradients.

    Lightning assumes that a fused optimizer undoes the scaling by itself, so that clipping before would be too early
    (https://github.com/Lightning-AI/pytorch-lightning/issues/21435). The attribute is torch's, which reads it only
    where gradients are scaled.
    """
    optimizer._step_supports_amp_scaling = False


def random_states() -> dict[str, Any]:
    """Random states of Python, NumPy and torch on the CPU."""
    return _collect_rng_states(include_cuda=False)


def set_random_states(states: dict[str, Any]) -> None:
    """Restore states from `random_states`."""
    _set_rng_states(states)


def saved_device(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage | None:
    """A `map_location` for `torch.load`: tensors go to their former device, or to the CPU if it does not exist."""
    return _default_map_location(storage, location)


def given_version(logger: TensorBoardLogger | CSVLogger) -> int | str | None:
    """The version that a logger was made with; None if it is to take the next number and has not done so yet."""
    return logger._version


def log_into_version(logger: TensorBoardLogger | CSVLogger, version: int | str, purge_step: int | None = None) -> None:
    """Before a logger writes anything: make it write to the folder of a version.

    Args:
        logger: which was made for another version.
        version: number of the folder, or its name if that is not `version_` and a number.
        purge_step: remove from TensorBoard's curves what was written from this step on. None: remove nothing.
    """
    logger._version = version
    if isinstance(logger, TensorBoardLogger) and purge_step is not None:
        logger._kwargs["purge_step"] = purge_step


def is_of_restoring(error: BaseException) -> bool:
    """Whether an error came from restoring a checkpoint in Lightning (and not from saving one)."""
    return any(
        frame.f_globals.get("__name__") == checkpoint_connector.__name__ and "dump" not in frame.f_code.co_name
        for frame, _ in walk_tb(error.__traceback__)
    )
