"""Curves and heat maps of a study, each with a CSV file of its numbers."""

import csv
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.evidence.results import Record

_DPI = 110


def draw_curves(best: Mapping[str, Sequence[Record]], metric: str, path: Path) -> None:
    """Plot a validation metric by tokens and by FLOPs: means over seeds, and the range from minimum to maximum.

    Args:
        best: records of each form.
        metric: the metric.
        path: of the picture.
    """
    figure, (by_tokens, by_flops) = _subplots(1, 2)
    rows = []
    for number, (form, records) in enumerate(best.items()):
        points = _points(records, metric)
        tokens = [count for count, _ in points]
        flops = [count * records[0].flops_per_token for count in tokens]
        for axes, x in ((by_tokens, tokens), (by_flops, flops)):
            _band(axes, x, [values for _, values in points], form, number)
        rows += [
            (form, count, cost, len(values), statistics.fmean(values), min(values), max(values))
            for (count, values), cost in zip(points, flops, strict=True)
        ]
    by_tokens.set(xlabel="tokens", ylabel=metric)
    by_flops.set(xlabel="training FLOPs, attention counted")
    by_flops.legend(frameon=False)
    _save(figure, path, ("form", "tokens", "flops", "seeds", "mean", "least", "most"), rows)


def draw_needles(found: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Plot a heat map for each form: the share of complete answers by length and depth, as means over seeds.

    Args:
        found: what `dma-lightning needle` wrote, by form and seed.
        path: of the picture.
    """
    figure, panels = _subplots(1, len(found))
    rows = []
    for axes, (form, seeds) in zip(panels, found.items(), strict=True):
        cells: dict[tuple[int, float], list[float]] = {}
        for cell in (cell for seed in seeds for cell in seed["cells"]):
            if cell["answers"] is not None:
                cells.setdefault((cell["length"], cell["depth"]), []).append(cell["answers"])
        means = {key: statistics.fmean(values) for key, values in cells.items()}
        lengths, depths = (sorted({key[i] for key in means}) for i in (0, 1))
        grid = [[means.get((length, depth), math.nan) for length in lengths] for depth in depths]
        axes.imshow(grid, vmin=0, vmax=1, aspect="auto", cmap="viridis")
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45)
        axes.set_yticks(range(len(depths)), [f"{depth:g} %" for depth in depths])
        axes.set(title=form, xlabel="length")
        rows += [(form, *key, len(cells[key]), mean) for key, mean in sorted(means.items())]
    _save(figure, path, ("form", "length", "depth", "seeds", "answers"), rows)


def draw_positions(found: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Plot the loss by position in held-out documents: means over seeds, and the range from minimum to maximum.

    Args:
        found: what `dma-lightning positions` wrote, by form and seed.
        path: of the picture.
    """
    figure, (axes,) = _subplots(1, 1)
    rows = []
    for number, (form, seeds) in enumerate(found.items()):
        buckets: dict[tuple[int, int], list[float]] = {}
        for bucket in (bucket for seed in seeds for bucket in seed["buckets"]):
            if bucket["loss"] is not None:
                buckets.setdefault((bucket["first"], bucket["last"]), []).append(bucket["loss"])
        _band(axes, [last + 1 for _, last in buckets], list(buckets.values()), form, number)
        rows += [(form, *key, len(x), statistics.fmean(x), min(x), max(x)) for key, x in buckets.items()]
    axes.set_xscale("log", base=2)
    axes.set(xlabel="position, up to", ylabel="nats per token")
    axes.legend(frameon=False)
    _save(figure, path, ("form", "first", "last", "seeds", "mean", "least", "most"), rows)


def _points(records: Sequence[Record], metric: str) -> list[tuple[int, list[float]]]:
    """Numbers of tokens, each with the values of all seeds. A seed that ended earlier keeps its last value."""
    curves = [
        {step * record.tokens // record.steps: value for step, value in record.curves[metric] if value is not None}
        for record in records
    ]
    points = []
    for tokens in sorted({count for curve in curves for count in curve}):
        seen = [[value for count, value in curve.items() if count <= tokens] for curve in curves]
        if all(seen):
            points.append((tokens, [values[-1] for values in seen]))
    return points


def _band(axes: Axes, x: Sequence[float], values: Sequence[Sequence[float]], name: str, number: int) -> None:
    color = colormaps["tab10"](number)
    axes.plot(x, [statistics.fmean(own) for own in values], color=color, label=name)
    axes.fill_between(x, [min(own) for own in values], [max(own) for own in values], color=color, alpha=0.15, lw=0)


def _subplots(rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    """A figure that opens no window."""
    figure = Figure(figsize=(4.2 * columns, 3.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)


def _save(figure: Figure, path: Path, heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    figure.savefig(path, dpi=_DPI)
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(heads)
        writer.writerows(rows)
