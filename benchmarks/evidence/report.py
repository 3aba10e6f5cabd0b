"""The report on the results of a study so far."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence import plots, tables
from benchmarks.evidence.comparisons import at_best_rate, by_form, by_rate
from benchmarks.evidence.results import Record, Results
from benchmarks.evidence.studies import Study
from dma_lightning.files.atomic import atomic_write

REPORT = "report.md"

_PLOTS = {"needle": plots.draw_needles, "positions": plots.draw_positions}


def write_report(study: Study, results: Path, folder: Path) -> Path:
    """Write tables and plots of all records that belong to a study.

    Args:
        study: the study. Tables have its forms in the same order.
        results: file of the records.
        folder: folder for the report and the plots.

    Returns:
        The path of the report.

    Raises:
        ValueError: if there is no record, or none has a figure that the study wants.
    """
    found = Results.read(results)
    cells = found.of_study(study)
    records = [record for record in cells.values() if record is not None]
    if not records:
        raise ValueError(f"{results}: expected records of the study, got none; run it first")
    folder.mkdir(parents=True, exist_ok=True)
    tasks, forms = list(study.tasks), list(study.forms)
    records.sort(key=lambda record: (tasks.index(record.task), record.size, forms.index(record.form), record.cell))
    parts = [f"# {results.stem}", *_environments(records)]
    for task, size in dict.fromkeys((record.task, record.size) for record in records):
        own = [record for record in records if (record.task, record.size) == (task, size)]
        parts += _section(study, own, folder)
    parts += _speed(found)
    parts += _missing([str(cell) for cell, record in cells.items() if record is None], found.failures)
    path = folder / REPORT
    with atomic_write(path) as file:
        file.write(("\n\n".join(parts) + "\n").encode())
    return path


def _section(study: Study, records: list[Record], folder: Path) -> Iterator[str]:
    """The section about one task at one size."""
    task, (name, size) = study.tasks[records[0].task], (records[0].task, records[0].size)
    best = {form: at_best_rate(own, task) for form, own in by_form(records).items()}
    yield f"## {name}, {size}"
    yield from tables.forms_table(study, best, task)
    yield from tables.metric_tables(study, best, name)
    if any(len(by_rate(own)) > 1 for own in by_form(records).values()):
        yield "Each seed by learning rate:"
        yield tables.rates_table(records, task.metric)
    yield from tables.masks_table(best)
    stem = f"{name}-{size}"
    plots.draw_curves(best, task.metric, folder / f"{stem}-curves.png")
    yield f"![{task.metric} by tokens and by FLOPs]({stem}-curves.png)"
    for evaluation in task.evaluations:
        yield from _evaluation(evaluation, best, stem, folder)


def _evaluation(name: str, best: dict[str, list[Record]], stem: str, folder: Path) -> Iterator[str]:
    """The results of one evaluation command on the checkpoints of each form."""
    found: dict[str, list[Any]] = {
        form: [record.evaluations[name] for record in records if name in record.evaluations]
        for form, records in best.items()
    }
    found = {form: own for form, own in found.items() if own}
    if not found:
        return
    yield f"`{name}` of the checkpoints, means over seeds:"
    if name in _PLOTS:
        path = folder / f"{stem}-{name}.png"
        _PLOTS[name](found, path)
        yield f"![{name}]({path.name}) ([numbers]({path.with_suffix('.csv').name}))"
    if all("lengths" in report for own in found.values() for report in own):
        yield tables.lengths_table(found)


def _missing(names: Sequence[str], failures: Mapping[str, str]) -> Iterator[str]:
    if names:
        yield "## Missing"
        yield "\n".join(f"- {name}{f': {failures[name]}' if name in failures else ''}" for name in names)


def _environments(records: Sequence[Record]) -> Iterator[str]:
    machines: dict[str, int] = {}
    for record in records:
        found = record.environment
        device = found.get("gpu") or f"{found['cpu']}, {found['cores']} cores"
        name = f"{device}, Python {found['python']}, torch {found['torch']}, commit {found['commit']}"
        machines[name] = machines.get(name, 0) + 1
    yield "\n".join(f"- {count} trainings: {name}" for name, count in machines.items())


def _speed(found: Results) -> Iterator[str]:
    if calls := [call for call in found.invocations if call.whole]:
        yield "## Trainings per hour"
        yield "For calls of the runner that started and finished all of their trainings, with start-up and compilation:"
        yield tables.calls_table(calls)
