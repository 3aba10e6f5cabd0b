"""Atomic writes: a file exists whole or not at all, however the writing process ends."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_write(path: Path, suffix: str = ".tmp", mode: int = 0o666) -> Iterator[BinaryIO]:
    """Open a file for writing under a temporary name, and rename it to `path` once it is on disk.

    A write that fails leaves no file behind.

    Args:
        path: final name of the file. An existing file with this name stays until the rename.
        suffix: appended to `path` for the temporary name. If several hosts write, give each its own suffix.
        mode: permissions of the file from the first byte on; the umask applies.

    Raises:
        OSError: if the file cannot be written.
    """
    unfinished = path.with_name(f"{path.name}{suffix}")
    try:
        unfinished.unlink(missing_ok=True)  # left by a killed process, or a link to a file elsewhere
        with open(unfinished, "w+b", opener=lambda name, flags: os.open(name, flags | os.O_EXCL, mode)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        sync_folder(path.parent)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(unfinished)):  # not an error about another file
            raise write_error(path, error) from error
        raise


def write_error(path: Path, error: BaseException) -> OSError:
    """Make an error that says why a file cannot be written and what to do."""
    cause = error.__context__ if isinstance(error.__context__, OSError) else error  # torch's writer wraps the cause
    full = getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    advice = "make room" if full else "check the folder"
    return OSError(f"{path}: cannot be written ({cause}); {advice}; what was there before is intact")


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power loss, where the system supports it."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_DIRECTORY)
        with suppress(OSError):  # some network file systems refuse
            os.fsync(descriptor)
        os.close(descriptor)
