"""Processes that each run one command of `dma-lightning`.

They are forked from a server that has already imported everything they need. If the process that started a child ends,
for whatever reason, the child is terminated too, as if it were preempted. A child first waits until any other child
that works in the same folder has ended.
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

LOG = "log.txt"  # the output of all commands in a folder

_WAIT = 300  # seconds to wait for a process whose parent was killed; it may be compiling before it can save
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload([__name__])


def share(compiled: Path, parallel: int) -> None:
    """Set the environment that all processes share, before the first one starts. The user's own settings win.

    Args:
        compiled: folder for the cache of torch.compile.
        parallel: how many processes run at once.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled.resolve()))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, (os.cpu_count() or 1) // parallel)))
    # One thread each, so that figures from a CPU do not depend on how many trainings run at once.
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
        gpu: the only GPU that the command sees, one of `visible_gpus`. Default: all of them.
    """
    process = _forks.Process(target=_run, args=(folder.resolve(), arguments, gpu))
    process.start()
    return process


def _run(folder: Path, arguments: Sequence[str], gpu: str | None) -> None:
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # before anything in this process uses a device
    os.setsid()  # Ctrl+C must reach only the parent process, which then ends this one
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
