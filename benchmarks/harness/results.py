"""Result files: JSON under benchmarks/results, with the environment of a run and rows of figures."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from .environment import ROOT
from .tables import Part, Result, Row, markdown

RESULTS, CONFIGS = ROOT / "benchmarks" / "results", ROOT / "configs"


def load(name: str) -> Result:
    """A result file by its name without `.json`."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def write(path: Path, result: Result) -> None:
    """Write a result file, whole or not at all."""
    from dma_lightning.files.atomic import atomic_write  # not above: it imports Lightning, which takes seconds

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(f"{json.dumps(result, indent=1)}\n".encode())


def record(
    path: Path,
    result: Result,
    rows: Mapping[str, Iterable[Row]],
    tables: Callable[[Result], Iterable[Part]] | None = None,
) -> None:
    """Measure, print and add rows to a result, and write the file after each, so that an interruption loses one.

    Args:
        path: of the file.
        result: what else stands in it; extended by the rows.
        rows: by their name in the file; a generator measures a row when it is asked for it.
        tables: of the result, printed at the end.
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
