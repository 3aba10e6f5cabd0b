"""Shared by all tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    """The same random numbers whichever tests run before."""
    torch.manual_seed(0)
