"""Processes that each run one command of `dma-lightning`.

They are forked from a server that has imported all that they need. A process ends, as if preempted, when the one that
started it does, whatever ended that; and it waits until another that works in the same folder has ended.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch
from filelock import FileLock

from dma_lightning.cli import main

LOG = "log.txt"  # what all commands of a folder print

_WAIT = 300  # seconds for a process whose parent was killed: it may be compiling, and saves then
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload([__name__])


def share(compiled: Path, parallel: int) -> None:
    """Say what all processes have in common, before the first is started; what the user has said stands.

    Args:
        compiled: folder of what torch.compile makes.
        parallel: how many processes there are at once.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled.resolve()))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, (os.cpu_count() or 1) // parallel)))
    # One thread of torch each, so that figures from a CPU do not depend on how many runs are side by side.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES has them."""
    count, names = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return names.split(",")[:count] if names else [str(number) for number in range(count)]


def start_child(folder: Path, arguments: Sequence[str], gpu: str | None = None) -> ForkServerProcess:
    """Start a command.

    Args:
        folder: an existing folder, where the command's output goes.
        arguments: of `dma-lightning`.
        gpu: the only one that it sees, of `visible_gpus`. Default: all of them.
    """
    process = _forks.Process(target=_run, args=(folder.resolve(), arguments, gpu))
    process.start()
    return process


def _run(folder: Path, arguments: Sequence[str], gpu: str | None) -> None:
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # before anything here has asked for a device
    os.setsid()  # Ctrl+C is for the process that started this one, which ends it then
    log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log, stream.fileno())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with FileLock(folder / ".child", timeout=_WAIT):
        sys.argv = ["dma-lightning", *arguments]
        main()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
