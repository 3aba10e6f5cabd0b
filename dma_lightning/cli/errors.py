"""Which errors a command tells in one line, and which it shows as they are."""

import errno
import traceback

from dma_lightning.callbacks import UnstableTrainingError

# Errors of these kinds, if code of these packages raises them, say all that a user needs.
PACKAGES = {"dma_flex", "dma_kernels", "dma_lightning"}
TOLD = (ValueError, OSError, UnstableTrainingError)

# Errors of the system, whoever meets them, that are for users to mend.
ABOUT_PLACES = {errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT}


def error_of_ours(error: BaseException | None) -> BaseException | None:
    """The first of an error and its causes that our own code has raised to be read by users."""
    while error is not None:
        modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
        from_system = isinstance(error, OSError) and error.errno is not None
        if isinstance(error, TOLD) and not from_system and modules and modules[-1].partition(".")[0] in PACKAGES:
            return error
        error = error.__cause__ or error.__context__
    return None
