"""Fixtures for all tests."""

import contextlib
import os
from collections.abc import Iterator

import docstrings
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: its kernels then run on the CPU
    with contextlib.suppress(ModuleNotFoundError):  # where Triton is not installed, tests of kernels are skipped
        import interpreter

        interpreter.patch_once()
docstrings.read_once()
torch.set_float32_matmul_precision("highest")  # no TF32 where products in float32 are compared
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # processes whose threads wait for each other take ten times as long


@pytest.fixture(autouse=True)
def _reproducible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test gets the same random numbers, whatever ran before. LightningCLI sees none of pytest's arguments."""
    torch.manual_seed(0)
    monkeypatch.setattr("sys.argv", ["dma-lightning"])


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """Remove the process group of a test that trained with DDP, since later tests would sum their figures over it."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def _many_shapes() -> Iterator[None]:
    """Raise torch's limit on recompilation, since the tests in a process together compile many shapes."""
    with torch._dynamo.config.patch(recompile_limit=100):
        yield


@pytest.fixture
def device() -> str:
    """Where kernels run: on the GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"
