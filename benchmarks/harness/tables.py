"""How pages show the rows of a result file: tables in Markdown, pictures, and sentences."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .environment import ROOT

Row = dict[str, Any]
Result = dict[str, Any]
"""The content of a result file: environment and settings, and rows by name."""


@dataclass(frozen=True)
class Table:
    """Rows of a result file as a page shows them.

    Attributes:
        rows: those of the file, or what is made from them.
        caption: what was measured, on what, and whether lower or higher is better; empty if the page says so itself.
        columns: the column heads.
        cells: the cells of a row, None for an empty one. Default: the row itself.
        labels: how many columns from the left hold words, not numbers.
    """

    rows: Iterable[Any]
    caption: str
    columns: Sequence[str]
    cells: Callable[[Any], Iterable[object]] = iter
    labels: int = 1

    def markdown(self) -> str:
        """The caption, and the table below it."""
        numbers = len(self.columns) - self.labels
        lines = [_line(head or None for head in self.columns), "|" + " --- |" * self.labels + " ---: |" * numbers]
        lines += [_line(self.cells(row)) for row in self.rows]
        return "\n\n".join(filter(None, (self.caption, "\n".join(lines))))


@dataclass(frozen=True)
class Picture:
    """A picture among the tables.

    Attributes:
        caption: what it shows.
        file: its name in benchmarks/figures.
    """

    caption: str
    file: str


Part = Table | Picture | str
"""What a benchmark puts on a page. A string is a paragraph."""


def markdown(parts: Iterable[Part], folder: Path = ROOT) -> str:
    """All parts as Markdown, one below the other. Paths of pictures are relative to `folder`, where the page is."""
    return "\n\n".join(_markdown(part, folder) for part in parts)


def _markdown(part: Part, folder: Path) -> str:
    if isinstance(part, Table):
        return part.markdown()
    if isinstance(part, Picture):
        return f"![{part.caption}]({os.path.relpath(ROOT / 'benchmarks/figures' / part.file, folder)})"
    return part


def _line(cells: Iterable[object]) -> str:
    return "|" + "".join(" |" if cell is None else f" {cell} |" for cell in cells)


def interval(values: Sequence[float], unit: float = 1, style: str = ".3g") -> str:
    """Format (minimum, median, maximum) as "median [minimum - maximum]", in a unit."""
    low, middle, high = (f"{value / unit:{style}}" for value in values)
    return f"{middle} [{low} - {high}]"


def length_of(row: Row) -> str:
    """The length of a row in units of 1,024 tokens, such as `32k`."""
    return f"{row['length'] / 1024:g}k"


def shape_of(row: Row) -> str:
    """Query and KV heads, length, and window if there is one."""
    window = f", {row['window']}" if "window" in row else ""
    return f"{row['heads']}/{row['kv_heads']}, {length_of(row)}{window}"


def cpu_of(result: Result) -> str:
    """CPU and versions of a result, in words."""
    e = result["environment"]
    threads = f"{e['threads']} thread{'s' * (e['threads'] > 1)}"
    return f"{e['cpu']}, {threads}, Python {e['python']}, torch {e['torch']}, commit {e['commit']}"


def gpu_of(result: Result) -> str:
    """GPU and versions of a result, in words."""
    e = result["environment"]
    return f"{e['gpu']}, CUDA {e['cuda']}, torch {e['torch']}, Triton {e['triton']}, commit {e['commit']}"
