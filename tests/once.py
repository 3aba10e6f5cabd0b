"""What takes long is made once, for all workers of pytest-xdist."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """A temporary folder of this run of pytest that all workers have."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def once(above: Path, name: str, make: Callable[[Path], object]) -> Path:
    """The folder `above / name`, which `make` has filled; who comes second waits, and makes nothing."""
    folder, made = above / name, above / f"{name}.made"
    with FileLock(above / f"{name}.lock"):
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            made.touch()
    return folder
