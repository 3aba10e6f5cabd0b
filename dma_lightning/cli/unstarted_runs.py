"""Deletes what a run wrote if the run ends before it trains."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from dma_lightning.files.locks import HOLDER, LOCK

# Files that a run writes before its first step. Other files stay, and so do their folders.
_WRITTEN = (
    *("config.yaml", "config_from_step_*.yaml", "hparams.yaml", "events.out.tfevents.*", "metrics.csv"),
    *(LOCK, HOLDER),
)


class UnstartedRuns(pl.Callback):
    """Records whether a run has trained, and which files existed before it.

    Args:
        trainer: the run's trainer, before it writes anything.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self.trained = False
        self.before: set[Path] = set()
        self.folders: list[Path] = []
        if not trainer.is_global_zero:  # only its loggers write
            return
        logged = [Path(x) for logger in trainer.loggers if (x := getattr(logger, "log_dir", None))]
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it undeclared
        saved = [getattr(x, "dirpath", None) for x in callbacks if isinstance(x, Checkpoint)]
        for folder in [*(logged or [Path(trainer.default_root_dir)]), *(Path(x) for x in saved if x)]:
            self.folders += [folder / "checkpoints", folder]
        self.before = {x for folder in self.folders for x in _known(folder)}

    def on_train_batch_end(self, *_: Any) -> None:
        self.trained = True

    def clean(self) -> None:
        """Delete the new files of a run that has neither trained nor saved, and folders that are then empty."""
        if self.trained or any(x not in self.before for folder in self.folders for x in folder.glob("*.ckpt")):
            return
        for folder in self.folders:
            for file in _files(folder):
                if file not in self.before:
                    file.unlink()
            for place in (folder, *folder.parents):
                if place in self.before or not place.is_dir() or any(place.iterdir()):
                    break
                place.rmdir()


def _known(folder: Path) -> list[Path]:
    """Existing paths before a run: the folder and its parents, files that the run may write, and checkpoints."""
    return [
        x for x in (folder, *folder.parents, *_files(folder), *folder.glob("*.ckpt")) if x.exists() or x.is_symlink()
    ]


def _files(folder: Path) -> list[Path]:
    """Files in a folder that a run may have written before its first step."""
    return [file for pattern in _WRITTEN for file in folder.glob(pattern) if file.is_file()]
