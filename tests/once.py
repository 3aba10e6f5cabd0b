"""Slow preparations are made once, for all workers of pytest-xdist."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """A temporary folder that all workers of this pytest run share."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def once(above: Path, name: str, make: Callable[[Path], object]) -> Path:
    """The folder `above / name`, filled by `make`. The first caller fills it, and all others wait for it."""
    folder, made = above / name, above / f"{name}.made"
    with FileLock(above / f"{name}.lock"):
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            made.touch()
    return folder
