"""The callback that saves a run so that it survives any interruption and resumes exactly."""

import os
import re
import shutil
import signal
import sys
import threading
import warnings
from contextlib import ExitStack
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, Literal, TypedDict

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from dma_lightning.checkpoints.random_states import restore_rng_states, rng_states
from dma_lightning.distributed import of_all_processes
from dma_lightning.files.locks import locked_folder
from dma_lightning.files.reading import as_kind
from dma_lightning.trainer_state import accumulates, is_logging_step, set_logged_step, validates_next, write_logs

RNG_KEY = "rng_states"  # key in a checkpoint: the states of all processes, in the order of their ranks
# Options of `ModelCheckpoint` that conflict with exact resuming.
_REFUSED = ("every_n_epochs", "train_time_interval", "save_on_exception", "save_weights_only")


class _State(TypedDict, total=False):
    """The part of Lightning's and this callback's saved state that a resumed run restores."""

    best_model_path: str
    best_k_models: dict[str, Tensor]
    kept: list[str]


class ResumableCheckpoint(ModelCheckpoint):
    """Saves only between optimizer steps and with all random states, so that a resumed run equals an uninterrupted one.

    - It saves every `every_n_train_steps` steps, after each validation, and at the end. If a validation follows a step,
      it saves after the validation, so that resuming skips no validation. It never saves between accumulated batches.
    - On SIGTERM or the first Ctrl+C, it finishes the current step (and its validation), saves, and ends the run. With
      several processes, it does so after the next step that logs. Before the first step, SIGTERM ends the run at once.
    - On an exception, it saves nothing, because some callbacks have seen more of the step than others. The last regular
      checkpoint stays.
    - Without `monitor`, it keeps the two newest checkpoints, in case the newest is damaged, and the checkpoint that the
      run resumed from.
    - With `monitor`, it keeps the `save_top_k` checkpoints with the best validation (use at least 2), and the newest.
    - Only one run at a time may write to a folder, and a resumed run deletes checkpoints only in its own folder.

    Args:
        every_n_train_steps: optimizer steps between checkpoints.
        filename: see `ModelCheckpoint`.
        save_last: see `ModelCheckpoint`. Default: a link to the newest checkpoint; the link is never missing.
        save_on_validation_end: whether to save after every validation; if false, only after those that fall on a
            multiple of `every_n_train_steps`.
        **kwargs: more options of `ModelCheckpoint`, except other intervals, `save_on_train_epoch_end`,
            `save_on_exception` and `save_weights_only`.

    Raises:
        ValueError: if `monitor` is a training metric, which exists only at logging steps; if `filename` would create
            folders, or give all checkpoints the same name; if an option is one of the exceptions above; or if the
            options would not keep the newest checkpoint.
    """

    def __init__(
        self,
        every_n_train_steps: int = 500,
        filename: str = "{step}",
        save_last: bool | Literal["link"] | None = "link",
        save_on_validation_end: bool = True,
        **kwargs: Any,
    ) -> None:
        refused = {name: value for name in _REFUSED if (value := kwargs.get(name)) not in (None, False)}
        if every_n_train_steps < 1 or refused:
            raise ValueError(
                f"expected every_n_train_steps >= 1 and none of {', '.join(_REFUSED)}, got {every_n_train_steps} and "
                f"{refused}"
            )
        super().__init__(
            every_n_train_steps=every_n_train_steps,
            filename=filename,
            save_last=save_last,
            save_on_train_epoch_end=False,
            **kwargs,
        )
        # Metric names contain a slash, and Lightning inserts them before their values.
        if "/" in (filename if self.auto_insert_metric_name else re.sub(r"\{.*?\}", "", filename)):
            raise ValueError(
                f"filename: expected a name without a folder, got {filename!r}; for {{val/loss}}, set "
                "auto_insert_metric_name: false, which inserts only the number"
            )
        if "{step" not in filename and not self.monitor:
            raise ValueError(f"filename: expected {{step}} in it, or checkpoints overwrite others; got {filename!r}")
        if (self.monitor or "").startswith("train/"):
            raise ValueError(f"monitor: expected a validation metric, such as val/loss, got {self.monitor!r}")
        if not save_last and (self.monitor or self.save_top_k == 0):
            raise ValueError(
                f"save_last: expected link or true, since training resumes from the last, which monitor {self.monitor} "
                f"and save_top_k {self.save_top_k} do not keep; got {save_last}"
            )
        self.save_on_validation_end = save_on_validation_end
        self._kept: list[str] = []  # without `monitor`: paths that this callback may delete, newest last
        self._training = False  # whether there is something to save
        self._rng_to_load: list[dict[str, Any]] | None = None
        self._validated: int | None = None  # the step whose weights were validated last
        self._asked_to_stop: int | None = None  # the signal that asked it to stop
        self._locks = ExitStack()
        self._locked: Path | None = None  # the folder that no other run may write to

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        with warnings.catch_warnings():  # issued below instead, and not for a folder with only an old lock
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
            super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.save_top_k and any(self._folder.glob("[!.]*")):
            rank_zero_warn(f"Checkpoint directory {self.dirpath} exists and is not empty.")
        self._training, self._asked_to_stop = False, None
        tries_out = trainer.fast_dev_run  # type: ignore[attr-defined]  # Lightning sets it undeclared
        if stage == "fit" and not tries_out and "://" not in str(self.dirpath):
            self._lock(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._unlock()

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._take(signal.SIGTERM)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self._rng_to_load is not None:
            restore_rng_states(self._rng_to_load, trainer)
            self._rng_to_load = None
            self._last_global_step_saved = trainer.global_step
        here = self._folder.resolve()
        if self.save_last and trainer.ckpt_path and Path(trainer.ckpt_path).resolve().parent == here:
            # The existing link is this run's; Lightning would create another beside it.
            self.last_model_path = self.format_checkpoint_name({}, self.CHECKPOINT_NAME_LAST)
        self._training = True
        self._take(signal.SIGTERM)
        self._take(signal.SIGINT, instead_of=signal.default_int_handler)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        set_logged_step(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if accumulates(trainer):
            return  # checkpoints do not contain gradients
        if not validates_next(trainer):
            if trainer.global_step % self._every_n_train_steps == 0:
                self._save_now(trainer)
            # Several processes ask each other, which waits for GPUs: only at logging steps, or at all if none log.
            logs = trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning sets it undeclared
            if trainer.world_size == 1 or not logs or is_logging_step(trainer):
                self._stop_if_asked(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or accumulates(trainer):
            return
        self._validated = trainer.global_step
        if self.save_on_validation_end or trainer.global_step % self._every_n_train_steps == 0:
            self._save_now(trainer)
        self._stop_if_asked(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._leave_interrupts()
        if not accumulates(trainer):
            self._save_now(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._leave_interrupts()
        self._unlock()
        if isinstance(exception, SIGTERMException) and exception.code is None:  # from Lightning, before our handler
            exception.code = 128 + signal.SIGTERM
        if trainer.world_size > 1 and not isinstance(exception, SystemExit):
            print(
                f"\nrank {trainer.global_rank}: ended at step {trainer.global_step} by {type(exception).__name__}. "
                "If a connection was lost, another process ended first: its output says why, or it was killed. "
                "`--ckpt_path last` resumes from the last checkpoint",
                file=sys.stderr,
                flush=True,
            )

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[RNG_KEY] = of_all_processes(rng_states(trainer), trainer)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._rng_to_load = checkpoint.get(RNG_KEY)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"kept": self._kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the list of checkpoints that this callback may delete: only those in this run's own folder.

        Raises:
            ValueError: if a part of the state has the wrong type, or a score is not a number.
        """
        saved = as_kind(state_dict, _State, "ResumableCheckpoint")
        scores, newest = saved.get("best_k_models", {}), saved.get("best_model_path", "")
        if not all(score.numel() == 1 and not score.isnan() for score in scores.values()):
            raise ValueError(f"ResumableCheckpoint.best_k_models: expected a number for each file, got {scores}")
        self._kept = [path for path in saved.get("kept", [newest]) if self._is_own(path)]
        self.best_model_path = newest if self._is_own(newest) else ""
        self.best_k_models = {path: score for path, score in scores.items() if self._is_own(path)}
        if self.best_k_models:
            best, worst = (min, max) if self.mode == "min" else (max, min)
            self.best_model_path = best(self.best_k_models, key=self.best_k_models.__getitem__)
            self.best_model_score = self.best_k_models[self.best_model_path]
            self.kth_best_model_path = worst(self.best_k_models, key=self.best_k_models.__getitem__)
            self.kth_value = self.best_k_models[self.kth_best_model_path]

    @property
    def _folder(self) -> Path:
        """Folder of the checkpoints, known from `setup` on."""
        assert self.dirpath is not None
        return Path(self.dirpath).expanduser()

    def _is_own(self, path: str) -> bool:
        """Whether this callback could have written a checkpoint to this path."""
        file = Path(path).expanduser()
        in_folder = file.parent.resolve() == self._folder.resolve()
        return in_folder and not file.is_symlink() and re.fullmatch(self._own_names(), file.name) is not None

    def _own_names(self) -> str:
        """Regular expression for the file names that `filename` produces."""
        assert self.filename is not None
        literals = re.split(r"\{(.*?)(?::.*?)?\}", self.filename)  # every second item is the name of a metric
        names = [f"{name}=" if self.auto_insert_metric_name else "" for name in literals[1::2]]
        figures = [re.escape(name) + r"[-+.,%\w ]+" for name in names]
        parts = zip_longest(map(re.escape, literals[::2]), figures, fillvalue="")
        return "".join(chain.from_iterable(parts)) + r"(-v\d+)?" + re.escape(self.FILE_EXTENSION)

    def _lock(self, trainer: pl.Trainer) -> None:
        """Lock the folder so that no other run writes to it.

        Raises:
            ValueError: in all processes, if another run holds the lock.
        """
        folder, problem = self._folder, None
        beside = [x._locked for x in trainer.checkpoint_callbacks if isinstance(x, ResumableCheckpoint)]
        if trainer.is_global_zero and folder.resolve() not in beside:  # a callback that keeps the best may share it
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._locks.enter_context(locked_folder(folder, "wait until it ends, or give this run another folder"))
                self._locked = folder.resolve()
            except (ValueError, OSError) as error:
                problem = f"{error}"
        if problem := of_all_processes(problem, trainer)[0]:
            raise ValueError(problem)

    def _unlock(self) -> None:
        self._locks.close()
        self._locked = None

    def _take(self, number: int, instead_of: Any = None) -> None:
        """Let a signal ask this callback to stop; Python allows this only in the main thread.

        Lightning's own handler may end processes at different steps. Lightning restores the earlier handler at the end.

        Args:
            number: number of the signal.
            instead_of: the handler to replace; any other handler stays. Default: replace any.
        """
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and instead_of in (None, signal.getsignal(number)):
            signal.signal(number, self._ask_to_stop)

    def _ask_to_stop(self, number: int, *_: Any) -> None:
        if not self._training:  # there is nothing to save yet
            raise SIGTERMException(128 + number)
        self._asked_to_stop = number
        if number == signal.SIGINT:
            self._leave_interrupts()
            rank_zero_info(
                "\nCtrl+C: the run saves and ends after this step (with several processes, after the next that logs); "
                "press it again to end now"
            )

    def _leave_interrupts(self) -> None:
        """Let Ctrl+C raise `KeyboardInterrupt` again."""
        if signal.getsignal(signal.SIGINT) == self._ask_to_stop:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _stop_if_asked(self, trainer: pl.Trainer) -> None:
        """End the run in all processes after the same step if any of them was asked to stop."""
        if trainer.strategy.reduce_boolean_decision(self._asked_to_stop is not None, all=False):
            self._save_now(trainer)
            if not trainer.validating:
                write_logs(trainer)
            number = signal.Signals(self._asked_to_stop or signal.SIGTERM)
            rank_zero_info(f"{number.name}: step {trainer.global_step} is saved; `--ckpt_path last` resumes")
            raise SIGTERMException(128 + number)  # not the exit status of a finished run

    def _save_now(self, trainer: pl.Trainer) -> None:
        """Save unless this step is already saved."""
        if self._should_skip_saving_checkpoint(trainer):
            return
        candidates = self._monitor_candidates(trainer)
        if self.monitor is None or self._validated == trainer.global_step:  # else the metric is of other weights
            self._save_topk_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)

    def _save_none_monitor_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        """As Lightning's, but the previous checkpoint stays until the next exists."""
        path = self._get_metric_interpolated_filepath_name(monitor_candidates, trainer, self.best_model_path)
        before = [x for x in self._kept if x != path] if self.save_top_k == 1 else []
        self._kept, self.best_model_path = [*before, path], path  # before saving, because both are part of the state
        self._save_checkpoint(trainer, path)
        began_with = Path(trainer.ckpt_path).resolve() if trainer.ckpt_path else None
        for outdated in before[:-1]:
            if Path(outdated).resolve() != began_with and self._should_remove_checkpoint(trainer, outdated, path):
                self._remove_checkpoint(trainer, outdated)
                self._kept.remove(outdated)

    def _save_last_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        # The checkpoint is not among the best, so there is nothing to link to.
        if self.save_last and self._last_global_step_saved != trainer.global_step:
            self._last_checkpoint_saved = ""
            link = Path(self.format_checkpoint_name(monitor_candidates, self.CHECKPOINT_NAME_LAST)).expanduser()
            if trainer.is_global_zero and link.is_symlink() and link.is_dir():  # a sharded checkpoint would go into it
                link.unlink()
            trainer.strategy.barrier()
        super()._save_last_checkpoint(trainer, monitor_candidates)

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        if self.save_last == "link" and self.last_model_path:  # before the link's old target is deleted
            self._link_checkpoint(trainer, filepath, self.last_model_path)

    @staticmethod
    def _link_checkpoint(trainer: pl.Trainer, filepath: str, linkpath: str) -> None:
        """As Lightning's, but the old link stays until the new one exists."""
        file, link = (Path(path).expanduser().absolute() for path in (filepath, linkpath))
        if trainer.is_global_zero and file != link:
            new = Path(f"{link}.tmp")
            new.unlink(missing_ok=True)
            new.symlink_to(os.path.relpath(file, link.parent))
            if link.is_dir() and not link.is_symlink():  # a sharded checkpoint that was saved as the last
                shutil.rmtree(link)
            new.replace(link)
        trainer.strategy.barrier()
