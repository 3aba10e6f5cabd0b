"""A small run, made once for all tests of a process that copy it."""

from pathlib import Path

import pytest
import small_run


@pytest.fixture(scope="session")
def _small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["dma-lightning"])
        small_run.make(folder)
    return folder
