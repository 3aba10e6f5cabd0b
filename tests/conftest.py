"""Shared by all tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _reproducible(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same random numbers whichever tests run before; and LightningCLI sees no arguments of pytest's."""
    torch.manual_seed(0)
    monkeypatch.setattr("sys.argv", ["dma-lightning"])
