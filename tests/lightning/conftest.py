"""A small run, made once per process for all tests that copy it; and clean-up after runs in float64."""

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
    """Use one thread, and restore the default dtype after runs that set it to float64."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float32)
