"""How commands end with errors: in one line if a user can mend what is wrong, else with a traceback."""

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

# Errors of these kinds, if code of these packages raises them, say all that a user needs.
PACKAGES = {"dma_flex", "dma_kernels", "dma_lightning"}
_OURS = (ValueError, OSError, UnstableTrainingError)

# Those of Lightning that are about how it was set up, if its own code raises them.
_OF_LIGHTNING = (ValueError, ImportError, MisconfigurationException)

# Errors of the system, whoever meets them, that are for users to mend.
_ABOUT_PLACES = {errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT}

# How jsonargparse says that a class of a configuration could not be made, such as for want of a package.
CLASS_PROBLEM = re.compile(r"Problem with given class_path '([^']+)':\s*(.*?)(?=\n {2,4}- |\nGiven|\Z)", re.DOTALL)

_LONGEST = 600  # characters of a message


def shows_traceback() -> bool:
    """Whether the user wants all that is known about an error."""
    return os.environ.get("DMA_LIGHTNING_TRACEBACK", "0") not in ("", "0")


def shortened(message: str) -> str:
    """A message in one line."""
    return textwrap.shorten(message, _LONGEST, placeholder=" ... (DMA_LIGHTNING_TRACEBACK=1 shows all)")


@contextmanager
def told_errors(command: str, own: bool) -> Iterator[None]:
    """A region whose errors end the process: with status 1 and a line on stderr if they are for users to mend.

    Args:
        command: with which the line begins.
        own: whether it is a command of our own, all of whose `ValueError` and `OSError` are for users.
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
    """What to tell about an error; None if it is nothing that a user could mend."""
    if ours := error_of_ours(error):
        return str(ours)
    if isinstance(error, OSError) and error.errno in _ABOUT_PLACES:
        return f"{error}; make room, or name a place where files can be written"
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"{str(error).partition('. ')[0]}; lower data.batch_size (and raise trainer.accumulate_grad_batches) or "
            "data.sequence_length, or set model.activation_checkpointing to true"
        )
    package = _raised_in(error).partition(".")[0]
    if package == "jsonargparse" and (found := CLASS_PROBLEM.search(str(error))):
        return f"{found[1]}: {found[2].strip()}"
    of_lightning = isinstance(error, _OF_LIGHTNING) and package == "lightning"
    return str(error) if of_lightning or (own and isinstance(error, (ValueError, OSError))) else None


def error_of_ours(error: BaseException | None) -> BaseException | None:
    """The first of an error and its causes that our own code has raised to be read by users."""
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
