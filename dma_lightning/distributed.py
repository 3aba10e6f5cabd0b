"""What the processes of a run agree on, and how they end together."""

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import LightningEnvironment


class SameCheckpoint(pl.Callback):
    """Makes sure that all processes resume from the same checkpoint.

    Args:
        path: the checkpoint that this process found; None if it found none.

    Raises:
        ValueError: in `setup`, if the processes found different ones, such as when one does not see a new file yet.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        paths = of_all_processes(self.path and str(self.path.resolve()), trainer)
        if len(set(paths)) > 1:
            each = "; ".join(f"rank {rank} {path or 'none'}" for rank, path in enumerate(paths))
            raise ValueError(
                f"ckpt_path: expected the same checkpoint in all processes, got {each}; start again when all of them "
                "see the same files"
            )


def of_all_processes(value: Any, trainer: pl.Trainer) -> list[Any]:
    """The value of each process, in the order of ranks; all processes must call it."""
    values = [value] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def end_with_first_process(trainer: pl.Trainer) -> None:
    """End this process once the first process of its machine is gone, if Lightning started it from there.

    The first process normally ends the others. But if it is killed, they may wait for it for half an hour, until a
    timeout.
    """
    if (
        isinstance(getattr(trainer.strategy, "cluster_environment", None), LightningEnvironment)
        and trainer.local_rank > 0
    ):
        threading.Thread(target=_watch, args=(os.getppid(), trainer.global_rank), daemon=True).start()


def _watch(parent: int, rank: int, seconds: float = 5.0) -> None:
    while os.getppid() == parent:
        time.sleep(seconds)
    print(
        f"rank {rank}: the first process has ended, so this one ends too; resume with `--ckpt_path last`",
        file=sys.stderr,
    )
    os._exit(1)
