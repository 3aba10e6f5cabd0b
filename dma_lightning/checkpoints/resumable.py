"""When a run is saved, so that it survives any interruption and is exact to go on from."""

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

RNG_KEY = "rng_states"  # in a checkpoint: of each process, in the order of their ranks
# Options of `ModelCheckpoint` that a run which shall go on exactly cannot have.
_REFUSED = ("every_n_epochs", "train_time_interval", "save_on_exception", "save_weights_only")


class _State(TypedDict, total=False):
    """What a resumed run takes over of the state that Lightning and this callback save."""

    best_model_path: str
    best_k_models: dict[str, Tensor]
    kept: list[str]


class ResumableCheckpoint(ModelCheckpoint):
    """Saves between optimizer steps only, with all states of random numbers, so that a resumed run is the same run.

    - It saves every so many steps, after each validation, and at the end. A step that a validation follows is saved
      after the validation, so that resuming leaves none out; between accumulated batches nothing is saved.
    - On SIGTERM, and the first Ctrl+C, it saves after the step that is being made (and its validation), and ends the
      run; with several processes, after the next step that logs. Before the first step, SIGTERM ends the run at once.
    - On an exception nothing is saved, since some callbacks have seen more of the step than others: the last regular
      checkpoint stands.
    - Without `monitor`, the newest two checkpoints are kept, in case the newest turns out to be damaged, and the one
      that the run went on from.
    - Only one run at a time may write to a folder, and a resumed one removes checkpoints of its own folder alone.
    - With `monitor`, the `save_top_k` best of those that were validated are kept (give at least 2), and the newest as
      the last.

    Args:
        every_n_train_steps: optimizer steps between two checkpoints.
        filename: see `ModelCheckpoint`.
        save_last: see `ModelCheckpoint`; by default a link to the newest, which is never missing.
        save_on_validation_end: whether every validation is followed by a checkpoint, or those alone that come when
            `every_n_train_steps` have passed.
        **kwargs: further options of `ModelCheckpoint`, except other intervals, `save_on_train_epoch_end`,
            `save_on_exception` and `save_weights_only`.

    Raises:
        ValueError: if `monitor` is a figure of training, which is there at logging steps alone; if `filename` would
            make folders, or give all checkpoints one name; on options that are refused, or with which the newest
            would not be saved.
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
        # Names of metrics have a slash, and are inserted before their values.
        if "/" in (filename if self.auto_insert_metric_name else re.sub(r"\{.*?\}", "", filename)):
            raise ValueError(
                f"filename: expected one without a folder, got {filename!r}; of {{val/loss}}, "
                "auto_insert_metric_name: false leaves the number alone"
            )
        if "{step" not in filename and not self.monitor:
            raise ValueError(f"filename: expected {{step}} in it, so that none is written over, got {filename!r}")
        if (self.monitor or "").startswith("train/"):
            raise ValueError(f"monitor: expected a figure of validation, such as val/loss, got {self.monitor!r}")
        if not save_last and (self.monitor or self.save_top_k == 0):
            raise ValueError(
                f"save_last: expected link or true, since training goes on from the last, which monitor {self.monitor} "
                f"and save_top_k {self.save_top_k} do not keep; got {save_last}"
            )
        self.save_on_validation_end = save_on_validation_end
        self._kept: list[str] = []  # without `monitor`: paths that are this callback's to remove, the newest last
        self._training = False  # whether there is something to save
        self._rng_to_load: list[dict[str, Any]] | None = None
        self._validated: int | None = None  # the step whose weights were validated last
        self._asked_to_stop: int | None = None  # the signal that asked
        self._locks = ExitStack()
        self._locked: Path | None = None  # the folder that no other run may write to

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        with warnings.catch_warnings():  # Lightning's warning is below, for folders with more than an old lock
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
            # The link that is there is this run's; Lightning would make another beside it.
            self.last_model_path = self.format_checkpoint_name({}, self.CHECKPOINT_NAME_LAST)
        self._training = True
        self._take(signal.SIGTERM)
        self._take(signal.SIGINT, instead_of=signal.default_int_handler)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        set_logged_step(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if accumulates(trainer):
            return  # gradients are in no checkpoint
        if not validates_next(trainer):
            if trainer.global_step % self._every_n_train_steps == 0:
                self._save_now(trainer)
            # Several processes ask each other, and wait for their GPUs; if no step logs, after each all the same.
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
        if isinstance(exception, SIGTERMException) and exception.code is None:  # Lightning's, from before ours
            exception.code = 128 + signal.SIGTERM
        if trainer.world_size > 1 and not isinstance(exception, SystemExit):
            print(
                f"\nrank {trainer.global_rank}: ended at step {trainer.global_step} by {type(exception).__name__}. "
                "If a connection was lost, another process ended first: its output says why, or it was killed. "
                "`--ckpt_path last` goes on from the last checkpoint",
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
        """Take over which checkpoints are this callback's to remove: those in this run's own folder alone.

        Raises:
            ValueError: if a part of the state has another type, or a score is no number.
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
        """Where checkpoints are, from `setup` on."""
        assert self.dirpath is not None
        return Path(self.dirpath).expanduser()

    def _is_own(self, path: str) -> bool:
        """Whether this callback can have written a checkpoint there."""
        file = Path(path).expanduser()
        in_folder = file.parent.resolve() == self._folder.resolve()
        return in_folder and not file.is_symlink() and re.fullmatch(self._own_names(), file.name) is not None

    def _own_names(self) -> str:
        """Pattern of the file names that `filename` leads to."""
        assert self.filename is not None
        literals = re.split(r"\{(.*?)(?::.*?)?\}", self.filename)  # every second is the name of a figure
        names = [f"{name}=" if self.auto_insert_metric_name else "" for name in literals[1::2]]
        figures = [re.escape(name) + r"[-+.,%\w ]+" for name in names]
        parts = zip_longest(map(re.escape, literals[::2]), figures, fillvalue="")
        return "".join(chain.from_iterable(parts)) + r"(-v\d+)?" + re.escape(self.FILE_EXTENSION)

    def _lock(self, trainer: pl.Trainer) -> None:
        """Be the only run that writes to the folder.

        Raises:
            ValueError: in all processes, if another run does.
        """
        folder, problem = self._folder, None
        beside = [x._locked for x in trainer.checkpoint_callbacks if isinstance(x, ResumableCheckpoint)]
        if trainer.is_global_zero and folder.resolve() not in beside:  # as where the best are kept besides
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._locks.enter_context(locked_folder(folder, "wait for its end, or give this run another folder"))
                self._locked = folder.resolve()
            except (ValueError, OSError) as error:
                problem = f"{error}"
        if problem := of_all_processes(problem, trainer)[0]:
            raise ValueError(problem)

    def _unlock(self) -> None:
        self._locks.close()
        self._locked = None

    def _take(self, number: int, instead_of: Any = None) -> None:
        """Let a signal ask this callback to stop; from the main thread only, where Python allows it.

        Lightning's own handler may end processes at different steps. At the end, it puts back what was before.

        Args:
            number: of the signal.
            instead_of: the handler to replace; if another is installed, that stays. Default: any.
        """
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and instead_of in (None, signal.getsignal(number)):
            signal.signal(number, self._ask_to_stop)

    def _ask_to_stop(self, number: int, *_: Any) -> None:
        if not self._training:  # nothing is made yet that could be saved
            raise SIGTERMException(128 + number)
        self._asked_to_stop = number
        if number == signal.SIGINT:
            self._leave_interrupts()
            rank_zero_info(
                "\nCtrl+C: the run is saved and ends after this step (of several processes, the next that logs); "
                "once more ends it now"
            )

    def _leave_interrupts(self) -> None:
        """Let Ctrl+C raise `KeyboardInterrupt` again."""
        if signal.getsignal(signal.SIGINT) == self._ask_to_stop:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _stop_if_asked(self, trainer: pl.Trainer) -> None:
        """End the run, in all processes after the same step, if one of them was asked to."""
        if trainer.strategy.reduce_boolean_decision(self._asked_to_stop is not None, all=False):
            self._save_now(trainer)
            if not trainer.validating:
                write_logs(trainer)
            number = signal.Signals(self._asked_to_stop or signal.SIGTERM)
            rank_zero_info(f"{number.name}: step {trainer.global_step} is saved; `--ckpt_path last` goes on")
            raise SIGTERMException(128 + number)  # a status other than that of a finished run

    def _save_now(self, trainer: pl.Trainer) -> None:
        """Save, unless this step is saved already."""
        if self._should_skip_saving_checkpoint(trainer):
            return
        candidates = self._monitor_candidates(trainer)
        if self.monitor is None or self._validated == trainer.global_step:  # else the figure is of other weights
            self._save_topk_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)

    def _save_none_monitor_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        """As Lightning's, but the one before stays until the next is there."""
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
        # Not among the best, so there is nothing to link to.
        if self.save_last and self._last_global_step_saved != trainer.global_step:
            self._last_checkpoint_saved = ""
            link = Path(self.format_checkpoint_name(monitor_candidates, self.CHECKPOINT_NAME_LAST)).expanduser()
            if trainer.is_global_zero and link.is_symlink() and link.is_dir():  # into which a sharded one would go
                link.unlink()
            trainer.strategy.barrier()
        super()._save_last_checkpoint(trainer, monitor_candidates)

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        if self.save_last == "link" and self.last_model_path:  # before the file that it names is removed
            self._link_checkpoint(trainer, filepath, self.last_model_path)

    @staticmethod
    def _link_checkpoint(trainer: pl.Trainer, filepath: str, linkpath: str) -> None:
        """As Lightning's, but the old link stands until the new one does."""
        file, link = (Path(path).expanduser().absolute() for path in (filepath, linkpath))
        if trainer.is_global_zero and file != link:
            new = Path(f"{link}.tmp")
            new.unlink(missing_ok=True)
            new.symlink_to(os.path.relpath(file, link.parent))
            if link.is_dir() and not link.is_symlink():  # a sharded checkpoint that was saved as the last
                shutil.rmtree(link)
            new.replace(link)
        trainer.strategy.barrier()
