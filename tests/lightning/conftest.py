"""A small run, made once for all tests of a process that copy it, and what goes back after runs in float64."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import small_run
import torch


@pytest.fixture(scope="session")
def _small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["dma-lightning"])
        small_run.make(folder)
    return folder


@pytest.fixture(scope="module")
def runs_in_double() -> Iterator[None]:
    """One thread, and the default dtype back after runs that make it float64."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float32)
