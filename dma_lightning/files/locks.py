"""Locks, so that one process at a time writes to a folder."""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

LOCK, HOLDER = ".lock", ".lock-holder"  # files in a locked folder; the second says who holds the first


@contextmanager
def locked_folder(folder: Path, advice: str) -> Iterator[None]:
    """Be the only process that writes to a folder.

    Where the file system has locks, the system ends this one with the process, however that ends.

    Args:
        folder: an existing folder.
        advice: what to do if another process has it, for the message.

    Raises:
        ValueError: if another process has it; the message names that process.
    """
    try:
        lock = FileLock(folder / LOCK, timeout=0).acquire()
    except Timeout as error:
        raise ValueError(
            f"{folder}: expected no other process to write there, got {_holder(folder)}; {advice}"
        ) from error
    with lock:
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:2]])
        now = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S")
        (folder / HOLDER).unlink(missing_ok=True)  # a link would lead elsewhere
        (folder / HOLDER).write_text(f"process {os.getpid()} on {socket.gethostname()} ({command}), since {now}")
        try:
            yield
        finally:
            with suppress(OSError):  # a folder that is gone has no holder
                (folder / HOLDER).unlink(missing_ok=True)


def _holder(folder: Path) -> str:
    try:
        return (folder / HOLDER).read_text()[:200]
    except OSError:
        return "one that has just begun"
