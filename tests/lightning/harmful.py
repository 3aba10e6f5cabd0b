"""An object that must never be unpickled."""

import os


class Harmful:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("harm",)
