"""Tables and plots of what a study has found so far."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.evidence import plots
from benchmarks.evidence.comparisons import Spread, at_best_rate, by_form, by_rate, paired, spread
from benchmarks.evidence.results import Record, Results
from benchmarks.evidence.studies import Study, Task
from dma_lightning.files.atomic import atomic_write

REPORT = "report.md"

_PLOTS = {"needle": plots.draw_needles, "positions": plots.draw_positions}


def write_report(study: Study, results: Path, folder: Path) -> Path:
    """Write tables and plots of all records that belong to a study.

    Args:
        study: what was asked for; the order of its forms is that of the tables.
        results: file of the records.
        folder: where report and plots go.

    Returns:
        The report.

    Raises:
        ValueError: if there is no record.
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
    """What there is to say about one task at one size."""
    task, (name, size) = study.tasks[records[0].task], (records[0].task, records[0].size)
    best = {form: at_best_rate(own, task) for form, own in by_form(records).items()}
    yield f"## {name}, {size}"
    yield (
        f"`{task.metric}` at the end, {task.better} is better; mean ± standard deviation of n seeds. Differences are "
        f"those to `{study.baseline}` of the same seed, with a 95 % confidence interval of their mean (Student's t)."
    )
    yield "\n".join(_table(study, best, task))
    if any(len(by_rate(own)) > 1 for own in by_form(records).values()):
        yield "Each seed by learning rate:"
        yield "\n".join(_rates(records, task.metric))
    stem = f"{name}-{size}"
    plots.draw_curves(best, task.metric, folder / f"{stem}-curves.png")
    yield f"![{task.metric} by tokens and by FLOPs]({stem}-curves.png)"
    for evaluation in task.evaluations:
        yield from _evaluation(evaluation, best, stem, folder)


def _table(study: Study, best: dict[str, list[Record]], task: Task) -> Iterator[str]:
    heads = ["form", "parameters", "keys per query", "training FLOPs per token", "lr", "million tokens", "n"]
    heads += [task.metric, "difference"]
    yield f"| {' | '.join(heads)} |"
    yield "| --- |" + " ---: |" * (len(heads) - 1)
    for form, records in best.items():
        first, figures = records[0], spread(records, task.metric)
        difference = None
        if form != study.baseline and study.baseline in best:
            difference = paired(records, best[study.baseline], task.metric)
        tokens = sorted({f"{record.tokens / 1e6:.1f}" for record in records}, key=float)
        cells = [
            form,
            f"{first.parameters / 1e6:.2f}M",
            _keys(first),
            f"{first.flops_per_token:.3g}",
            f"{first.lr:g}",
            " - ".join(tokens if len(tokens) < 3 else (tokens[0], tokens[-1])),
            f"{len(records)}" if figures and len(figures.values) == len(records) else _diverged(records, figures),
            "diverged" if figures is None else _number(figures.mean, figures.deviation),
            "" if difference is None else _interval(difference.mean, difference.interval),
        ]
        yield f"| {' | '.join(cells)} |"


def _diverged(records: Sequence[Record], figures: Spread | None) -> str:
    return f"{len(figures.values) if figures else 0} of {len(records)}, others diverged"


def _rates(records: Sequence[Record], metric: str) -> Iterator[str]:
    """A row for each form, a column for each rate; the values of all seeds."""
    rates = sorted({record.lr for record in records})
    yield f"| form | {' | '.join(f'{lr:g}' for lr in rates)} |"
    yield "| --- |" + " ---: |" * len(rates)
    for form, own in by_form(records).items():
        found = by_rate(own)
        cells = [", ".join(f"{record.final(metric):.4f}" for record in found.get(lr, [])) for lr in rates]
        yield f"| {form} | {' | '.join(cells)} |"


def _evaluation(name: str, best: dict[str, list[Record]], stem: str, folder: Path) -> Iterator[str]:
    """What a command found in the checkpoints of each form."""
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
        yield "\n".join(_lengths(found))


def _lengths(found: dict[str, list[Any]]) -> Iterator[str]:
    """A row for each form and length."""
    names = {
        "loss": ("loss", 1, ".4f"),
        "accuracy": ("tokens right, %", 100, ".1f"),
        "answers": ("answers right, %", 100, ".1f"),
        "bits_per_byte": ("bits per byte", 1, ".4f"),
        "prompt_seconds_per_token": ("reading, µs per token", 1e6, ".2f"),
        "step_seconds": ("step, ms", 1e3, ".2f"),
        "cache_bytes": ("cache, KiB", 1 / 1024, ",.0f"),
    }
    yield f"| form | length | {' | '.join(title for title, _, _ in names.values())} |"
    yield "| --- |" + " ---: |" * (1 + len(names))
    for form, reports in found.items():
        for rows in zip(*(report["lengths"] for report in reports), strict=True):
            cells = [form, f"{rows[0]['length']:,}"]
            for name, (_, factor, style) in names.items():
                values = [row[name] for row in rows if row.get(name) is not None]
                cells.append(f"{factor * fmean(values):{style}}" if values else "")
            yield f"| {' | '.join(cells)} |"


def _keys(record: Record) -> str:
    """Keys that a query sees at most, compressed ones beside."""
    model, length = record.model, record.data["sequence_length"]
    seen = {
        "dma": lambda: model["keep_window_size"] + model["keep_last"] + model["sinks"],
        "swa": lambda: model["sliding_window"],
        "nsa": lambda: model["nsa_window"] + model["nsa_select_count"] * model["nsa_select_block"],
    }
    keys = f"{min(length, seen.get(model['attention'], lambda: length)()):,}"
    if model["attention"] == "nsa":
        blocks = (length - model["nsa_compress_block"]) // model["nsa_compress_stride"] + 1
        keys += f" and {blocks:,} compressed"
    return keys


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
    calls = [call for call in found.invocations if call.whole]
    if not calls:
        return
    yield "## Trainings per hour"
    yield "Of calls of the runner that have begun and finished what they ran, start and compilation included:"
    lines = ["| trainings | side by side | GPUs | seconds | an hour |", "| --- | ---: | ---: | ---: | ---: |"]
    for call in calls:
        kinds = ", ".join(dict.fromkeys(" ".join(name.split()[:2]) for name in call.cells))
        count, rate = len(call.cells), 3600 * len(call.cells) / call.seconds
        beside = min(call.parallel, count)
        lines.append(f"| {count} of {kinds} | {beside} | {call.gpus} | {call.seconds:,.0f} | {rate:,.0f} |")
    yield "\n".join(lines)


def _number(mean: float, deviation: float | None) -> str:
    return f"{mean:.4f}" if deviation is None else f"{mean:.4f} ± {deviation:.4f}"


def _interval(mean: float, interval: tuple[float, float] | None) -> str:
    return f"{mean:+.4f}" if interval is None else f"{mean:+.4f} [{interval[0]:+.4f}, {interval[1]:+.4f}]"
