"""Result files: JSON under benchmarks/results, with the environment of a run and rows of figures."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from .environment import ROOT
from .tables import Part, Result, Row, markdown

RESULTS, CONFIGS = ROOT / "benchmarks" / "results", ROOT / "configs"


def load(name: str) -> Result:
    """The content of a result file, by its name without `.json`."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def write(path: Path, result: Result) -> None:
    """Write a result file atomically: completely or not at all."""
    from dma_lightning.files.atomic import atomic_write  # here, since it imports Lightning, which takes seconds

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(f"{json.dumps(result, indent=1)}\n".encode())


def record(
    path: Path,
    result: Result,
    rows: Mapping[str, Iterable[Row]],
    tables: Callable[[Result], Iterable[Part]] | None = None,
) -> None:
    """Measure and print rows, and add them to a result. An interruption loses one row: the file is written after each.

    Args:
        path: of the result file.
        result: what else the file contains. The rows are added to it.
        rows: by their name in the file. A generator measures each row when the row is requested.
        tables: makes the tables of the result, which are printed at the end.
    """
    for name, measured in rows.items():
        result[name] = []
        for row in measured:
            result[name].append(row)
            print(name, row, flush=True)
            write(path, result)
    print(f"written to {path}")
    if tables is not None:
        print(markdown(tables(result)))
