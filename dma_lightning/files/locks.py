"""Locks: only one process at a time writes to a folder."""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

LOCK, HOLDER = ".lock", ".lock-holder"  # files in a locked folder; the second names the holder of the first


@contextmanager
def locked_folder(folder: Path, advice: str) -> Iterator[None]:
    """Lock a folder so that no other process writes to it.

    On a file system with locks, the system releases the lock when the process ends, however it ends.

    Args:
        folder: an existing folder.
        advice: what to do if another process holds the lock, for the message.

    Raises:
        ValueError: if another process holds the lock; the message names that process.
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
        (folder / HOLDER).unlink(missing_ok=True)  # writing through a link would change another file
        (folder / HOLDER).write_text(f"process {os.getpid()} on {socket.gethostname()} ({command}), since {now}")
        try:
            yield
        finally:
            with suppress(OSError):  # the folder may be gone
                (folder / HOLDER).unlink(missing_ok=True)


def _holder(folder: Path) -> str:
    try:
        return (folder / HOLDER).read_text()[:200]
    except OSError:
        return "one that has just started"
