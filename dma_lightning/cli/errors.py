"""Errors of commands: printed in one line if the user can fix the problem, else with a traceback."""

import errno
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from dma_lightning.callbacks import UnstableTrainingError

# Errors of these types tell users all they need if these packages raise them.
PACKAGES = {"dma_flex", "dma_kernels", "dma_lightning"}
_OURS = (ValueError, OSError, UnstableTrainingError)

# Errors about Lightning's setup, if its own code raises them.
_OF_LIGHTNING = (ValueError, ImportError, MisconfigurationException)

# System errors that users can fix, whichever code meets them.
_ABOUT_PLACES = {errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT}

# jsonargparse's message if it cannot create a configured class, for example because a package is missing.
CLASS_PROBLEM = re.compile(r"Problem with given class_path '([^']+)':\s*(.*?)(?=\n {2,4}- |\nGiven|\Z)", re.DOTALL)

_LONGEST = 600  # characters of a message


def shows_traceback() -> bool:
    """Whether the user asked for tracebacks."""
    return os.environ.get("DMA_LIGHTNING_TRACEBACK", "0") not in ("", "0")


def shortened(message: str) -> str:
    """Shorten a message to one line."""
    return textwrap.shorten(message, _LONGEST, placeholder=" ... (DMA_LIGHTNING_TRACEBACK=1 shows all)")


@contextmanager
def told_errors(command: str, own: bool) -> Iterator[None]:
    """A context whose errors end the process: with status 1 and one line on stderr if the user can fix them.

    Args:
        command: the start of the line.
        own: whether it is one of our own commands; users can fix each `ValueError` and `OSError` of these.
    """
    try:
        yield
    except KeyboardInterrupt:
        if shows_traceback() or not own:
            raise
        print(f"{command}: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        told = _told(error, own)
        if told is None or shows_traceback():
            raise
        sys.exit(f"{command}: {shortened(told)}")


def _told(error: Exception, own: bool) -> str | None:
    """The message for an error; None if a user cannot fix it."""
    if ours := error_of_ours(error):
        return str(ours)
    if isinstance(error, OSError) and error.errno in _ABOUT_PLACES:
        return f"{error}; make room, or choose a writable path"
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"{str(error).partition('. ')[0]}; lower data.batch_size (and raise trainer.accumulate_grad_batches) or "
            "data.sequence_length, set model.activation_checkpointing to true, or set model.loss_chunk"
        )
    package = _raised_in(error).partition(".")[0]
    if package == "jsonargparse" and (found := CLASS_PROBLEM.search(str(error))):
        return f"{found[1]}: {found[2].strip()}"
    of_lightning = isinstance(error, _OF_LIGHTNING) and package == "lightning"
    return str(error) if of_lightning or (own and isinstance(error, (ValueError, OSError))) else None


def error_of_ours(error: BaseException | None) -> BaseException | None:
    """The first of an error and its causes that our own code raised for users."""
    while error is not None:
        from_system = isinstance(error, OSError) and error.errno is not None
        if isinstance(error, _OURS) and not from_system and _raised_in(error).partition(".")[0] in PACKAGES:
            return error
        error = error.__cause__ or error.__context__
    return None


def _raised_in(error: BaseException) -> str:
    """The module whose code raised an error."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return modules[-1] if modules else ""
