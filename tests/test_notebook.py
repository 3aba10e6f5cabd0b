"""The notebook in docs runs from top to bottom, without a network."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

NOTEBOOK = Path(__file__).parents[1] / "docs/quickstart.ipynb"

# Before the first cell: sockets of Python reach nothing. The kernel's own are not Python's.
OFFLINE = """
import socket

def refuse(*_):
    raise OSError("this notebook must not use the network")

socket.getaddrinfo = socket.socket.connect = refuse
"""

# After the last cell.
CHECKS = """
assert after < before - 2, (before, after)
assert trainer.global_step < 100
assert attention.A.grad.abs().min() > 0
assert x.grad[:, :101].abs().sum() > 0 and not x.grad[:, 101:].any()
assert out.shape == (2, 8, 1000, 64) and out.isfinite().all()
"""


@pytest.fixture(scope="module")
def notebook() -> NotebookNode:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_is_stored_without_outputs(notebook: NotebookNode) -> None:
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)


def test_every_cell_runs_and_the_loss_falls(notebook: NotebookNode, tmp_path: Path) -> None:
    cells = [new_code_cell(OFFLINE), *notebook.cells, new_code_cell(CHECKS)]
    executed = nbformat.from_dict(notebook | {"cells": cells})
    client = NotebookClient(executed, timeout=240, resources={"metadata": {"path": str(tmp_path)}})
    own = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "IPYTHONDIR": str(tmp_path / "ipython")}
    client.execute(env=os.environ | own)  # raises CellExecutionError

    outputs = {cell.id: cell.get("outputs", []) for cell in executed.cells}
    pictures = {name for name, shown in outputs.items() if any("image/png" in x.get("data", {}) for x in shown)}
    assert pictures == {"window", "top-w", "top-w-drift", "draw"}
    assert len("".join(x.text for x in outputs["generate"] if x.get("name") == "stdout")) > 100
