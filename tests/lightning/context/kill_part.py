"""Kill one of two processes that divide sequences, and continue the run; started by `test_fit_parts.py`.

    python kill_part.py FOLDER

Processes are forked from this one, so that imports happen only once. Their output and results are in the folder.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from pydoc_data.topics import topics

import lightning.pytorch as pl
import torch
from fit_runs import DRIFT, train
from torch import Tensor

from dma_lightning.checkpoints.io import newest_checkpoint

RANK, BATCH = 0, 15  # which process is killed, and in which batch; the validation after batch 12 ended in a checkpoint


class Losses(pl.Callback):
    """Writes the loss of each batch to a file for its process, and may kill the process before a backward pass."""

    def __init__(self, file: Path, kills: bool) -> None:
        self.file, self.kills = file, kills

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        batch = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        with self.file.open("a") as file:
            file.write(json.dumps([batch, loss.item().hex()]) + "\n")
        if self.kills and (trainer.global_rank, batch) == (RANK, BATCH):
            os.kill(os.getpid(), signal.SIGKILL)


def start(folder: Path, kills: bool = False, ckpt_path: Path | None = None) -> list[int]:
    """Fork two processes that train; their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ |= {name: str(x) for name, x in variables.items()} | {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    processes = []
    for rank in range(2):
        processes.append(os.fork())
        if not processes[-1]:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            _run(folder, Losses(folder / f"losses{rank}.jsonl", kills), ckpt_path)
    return processes


def _run(folder: Path, losses: Losses, ckpt_path: Path | None) -> None:
    """Train in this process, with its output in `log.txt`, then end the process."""
    code = 1
    try:
        sys.stdout = sys.stderr = (folder / "log.txt").open("a", buffering=1)
        torch.set_num_threads(1)
        options = DRIFT | {"hidden_dropout": 0.2, "loss_chunk": 5}
        train(folder, parts=2, accumulate=2, ckpt_path=ckpt_path, callbacks=(losses,), **options)
        code = 0
    except BaseException:  # nothing of the parent's must run here
        traceback.print_exc()
    os._exit(code)


def end(process: int) -> int:
    """Wait for the end of a process; its exit code, below 0 for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def main(folder: Path) -> None:
    """Write how both processes ended, how long the second one took, and which checkpoint their successors read."""
    (folder / "text.txt").write_text("".join(topics.values())[:20000])
    whole, killed = folder / "whole", folder / "killed"
    for run in (whole, killed):
        run.mkdir()
    assert [end(process) for process in start(whole)] == [0, 0]
    processes = start(killed, kills=True)
    codes, began = [end(processes[RANK])], time.monotonic()
    codes.append(end(processes[1 - RANK]))
    seconds, checkpoint = time.monotonic() - began, newest_checkpoint([killed])
    assert [end(process) for process in start(killed, ckpt_path=checkpoint)] == [0, 0]
    (folder / "result.json").write_text(json.dumps([codes, seconds, checkpoint.name]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
