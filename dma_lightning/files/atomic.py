"""Atomic writes: a file is there whole or not at all, whatever ends the process that writes it."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_write(path: Path, suffix: str = ".tmp", mode: int = 0o666) -> Iterator[BinaryIO]:
    """A file to write that gets its name at the end, when it is on the disk; one that fails leaves nothing.

    Args:
        path: its name; a file that has it stands until then.
        suffix: of its name until then, in the same folder; what writes from several hosts needs one for each.
        mode: who may read and write it from the first byte on, before the umask.

    Raises:
        OSError: if it cannot be written.
    """
    unfinished = path.with_name(f"{path.name}{suffix}")
    try:
        unfinished.unlink(missing_ok=True)  # of a killed process, or a link to a file elsewhere
        with open(unfinished, "w+b", opener=lambda name, flags: os.open(name, flags | os.O_EXCL, mode)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        sync_folder(path.parent)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(unfinished)):  # not one that is read
            raise write_error(path, error) from error
        raise


def write_error(path: Path, error: BaseException) -> OSError:
    """What says that a file cannot be written, why, and what to do."""
    cause = error.__context__ if isinstance(error.__context__, OSError) else error  # torch's writer has its own
    full = getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    advice = "make room" if full else "see to the folder"
    return OSError(f"{path}: cannot be written ({cause}); {advice}; what was there before is whole")


def sync_folder(folder: Path) -> None:
    """Make names in a folder last beyond a loss of power, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_DIRECTORY)
        with suppress(OSError):  # which some network file systems refuse
            os.fsync(descriptor)
        os.close(descriptor)
