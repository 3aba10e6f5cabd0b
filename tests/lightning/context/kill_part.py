"""Kills one of two processes that divide sequences, and lets the run go on; started by `test_fit_parts.py`.

    python kill_part.py FOLDER

The run is compared with an uninterrupted one. What the processes printed stays in the folder.
"""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import kill_runs
import lightning.pytorch as pl

STEPS = 9  # of two batches each, with a checkpoint after every third
RANK, BATCH = 0, 9  # which process is killed, and in which batch


class Killed(pl.Callback):
    """Kills its process between a forward and a backward pass."""

    def on_before_backward(self, trainer: pl.Trainer, *_: object) -> None:
        if (trainer.global_rank, trainer.fit_loop.epoch_loop.batch_progress.total.ready) == (RANK, BATCH):
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path) -> None:
    """Writes in how many seconds the other process ended, and how many numbers have been compared."""
    kind = kill_runs.context_kind(folder)
    whole, killed = folder / "whole", folder / "killed"
    for run in (whole, killed):
        run.mkdir()
    kill_runs.finish(whole, STEPS, kind)
    options = [*kind.options, "--trainer.callbacks+=kill_part.Killed"]
    processes = kill_runs.start(killed, STEPS, replace(kind, options=options))
    assert os.waitstatus_to_exitcode(os.waitpid(processes[RANK], 0)[1]) == -signal.SIGKILL
    seconds = kill_runs.await_end(killed, processes[1 - RANK])
    kill_runs.finish(killed, STEPS, kind)
    (folder / "result.json").write_text(json.dumps([seconds, kill_runs.compare(killed, whole)]))


if __name__ == "__main__":
    folder = Path(sys.argv.pop(1))  # LightningCLI looks at the arguments
    main(folder)
