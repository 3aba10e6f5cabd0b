"""Result files: JSON under benchmarks/results, with the environment of a run and rows of figures."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dma_lightning.files.atomic import atomic_write

from .environment import ROOT

RESULTS, CONFIGS = ROOT / "benchmarks" / "results", ROOT / "configs"

Row = dict[str, Any]
Result = dict[str, Any]


def load(name: str) -> Result:
    """A result file by its name without `.json`."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def write(path: Path, result: Result) -> None:
    """Write a result file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(f"{json.dumps(result, indent=1)}\n".encode())


def record(path: Path, result: Result, rows: Mapping[str, Iterable[Row]]) -> Result:
    """Measure, print and add rows to a result, and write the file after each, so that an interruption loses one.

    Args:
        path: of the file.
        result: what else stands in it; extended by the rows.
        rows: by their name in the file; a generator measures a row when it is asked for it.

    Returns:
        The result.
    """
    for name, measured in rows.items():
        result[name] = []
        for row in measured:
            result[name].append(row)
            print(name, row, flush=True)
            write(path, result)
    print(f"written to {path}")
    return result
