"""Tables of a report, in Markdown: a row for each form."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from benchmarks.evidence.comparisons import Spread, by_form, by_rate, closed_share, holm, paired, spread
from benchmarks.evidence.masks import FIGURES, looked_at, mask_figures
from benchmarks.evidence.results import Invocation, Record
from benchmarks.evidence.studies import Study, Task

Best = Mapping[str, Sequence[Record]]
"""Records of each form at its best rate."""

Columns = dict[str, dict[str, str]]
"""Cells by column head and form."""

_DIFFERENCE, _P, _SHARE = "difference", "p (Holm)", "gap closed"


def forms_table(study: Study, best: Best, task: Task) -> Iterator[str]:
    """A paragraph and a table on what the forms are and how they compare by the task's metric."""
    columns = _descriptions(best) | _figures(best, task.metric, study.baseline) | _closed_shares(study, best, task)
    if task.solved is not None:
        head = f"{task.metric} {'≥' if task.better == 'higher' else '≤'} {task.solved:g}"
        columns[head] = {form: _solved(records, task) for form, records in best.items()}
    notes = {
        _DIFFERENCE: f"Differences are to `{study.baseline}` with the same seed, with a 95 % confidence interval of "
        "their mean (Student's t).",
        _P: "P values are from paired t tests, corrected by Holm's method for all forms in a table.",
        _SHARE: "The gap is from `{}` to `{}`. The share closed is (first - form) / (first - second), over the seeds "
        "that all three have, with a 95 % confidence interval (Fieller), or without one if there may be no gap.".format(
            *study.gap or ("", "")
        ),
    }
    about = f"`{task.metric}` at the end, {task.better} is better; mean ± standard deviation of n seeds."
    yield " ".join([about, *(text for head, text in notes.items() if head in columns)])
    yield _by_form(best, columns)


def metric_tables(study: Study, best: Best, name: str) -> Iterator[str]:
    """The further metrics of a task, each as a line and a table.

    Raises:
        ValueError: if no training has logged one of them.
    """
    for metric, better in study.tasks[name].also.items():
        logged = {form: [x for x in records if metric in x.curves] for form, records in best.items()}
        logged = {form: records for form, records in logged.items() if records}
        if not logged:
            known = sorted({tag for own in best.values() for x in own for tag in x.curves if tag.startswith("val/")})
            raise ValueError(f"tasks.{name}.also: expected figures of {known}, got {metric!r}")
        yield f"`{metric}` at the end of the same trainings, {better} is better:"
        yield _by_form(logged, _figures(logged, metric, study.baseline))


def rates_table(records: Sequence[Record], metric: str) -> str:
    """A table with a column for each learning rate, and the values of all seeds in each cell."""
    rates = sorted({record.lr for record in records})
    forms = {form: by_rate(own) for form, own in by_form(records).items()}
    columns = {
        f"{lr:g}": {form: ", ".join(f"{x.final(metric):.4f}" for x in own.get(lr, [])) for form, own in forms.items()}
        for lr in rates
    }
    return _by_form(forms, columns)


def masks_table(best: Best) -> Iterator[str]:
    """A paragraph and a table on what the dynamic masks of each form did. Nothing if no training logged it."""
    looked = {form: [x for x in records if looked_at(x)] for form, records in best.items()}
    looked = {form: records for form, records in looked.items() if records}
    if not looked:
        return
    yield (
        "What the dynamic masks did at the end, as means over layers and n seeds. Lost mass is the share of attention "
        "that falls on dropped keys. Efficiency, computed from these means, is 0 for a window and 1 for the best keys:"
    )
    found = {form: mask_figures(records) for form, records in looked.items()}
    columns = {"n": {form: f"{len(records)}" for form, records in looked.items()}}
    for name, head in FIGURES.items():
        columns[head] = {form: f"{own[name]:.4f}" for form, own in found.items() if name in own}
    yield _by_form(looked, columns)


def lengths_table(found: Mapping[str, Sequence[Any]]) -> str:
    """A table with a row for each form and length: an evaluation's means over the checkpoints of all seeds."""
    names = {
        "loss": ("loss", 1, ".4f"),
        "accuracy": ("tokens right, %", 100, ".1f"),
        "answers": ("answers right, %", 100, ".1f"),
        "bits_per_byte": ("bits per byte", 1, ".4f"),
        "prompt_seconds_per_token": ("reading, µs per token", 1e6, ".2f"),
        "step_seconds": ("step, ms", 1e3, ".2f"),
        "cache_bytes": ("cache, KiB", 1 / 1024, ",.0f"),
    }
    rows = []
    for form, reports in found.items():
        for looks in zip(*(report["lengths"] for report in reports), strict=True):
            cells = [form, f"{looks[0]['length']:,}"]
            for name, (_, factor, style) in names.items():
                values = [look[name] for look in looks if look.get(name) is not None]
                cells.append(f"{factor * fmean(values):{style}}" if values else "")
            rows.append(cells)
    return _markdown(["form", "length", *(head for head, _, _ in names.values())], rows)


def calls_table(calls: Iterable[Invocation]) -> str:
    """A table of how fast calls of the runner were."""
    rows = []
    for call in calls:
        kinds = ", ".join(dict.fromkeys(" ".join(name.split()[:2]) for name in call.cells))
        count, rate = len(call.cells), 3600 * len(call.cells) / call.seconds
        beside = min(call.parallel, count)
        rows.append([f"{count} of {kinds}", f"{beside}", f"{call.gpus}", f"{call.seconds:,.0f}", f"{rate:,.0f}"])
    return _markdown(["trainings", "side by side", "GPUs", "seconds", "an hour"], rows)


def _descriptions(best: Best) -> Columns:
    """What the forms are, and how they were trained."""
    columns: Columns = {}
    for form, records in best.items():
        first, tokens = records[0], sorted({f"{record.tokens / 1e6:.1f}" for record in records}, key=float)
        cells = {
            "parameters": f"{first.parameters / 1e6:.2f}M",
            "keys per query": _keys(first),
            "training FLOPs per token": f"{first.flops_per_token:.3g}",
            "lr": f"{first.lr:g}",
            "million tokens": " - ".join(tokens if len(tokens) < 3 else (tokens[0], tokens[-1])),
        }
        for head, cell in cells.items():
            columns.setdefault(head, {})[form] = cell
    return columns


def _figures(best: Best, metric: str, baseline: str) -> Columns:
    """Means, differences to the baseline, and, if there are several, their p values, corrected together."""
    spreads = {form: spread(records, metric) for form, records in best.items()}
    others = best.keys() - {baseline} if baseline in best else set()
    found = {form: paired(best[form], best[baseline], metric) for form in others}
    differences = {form: x for form, x in found.items() if x is not None}
    columns = {
        "n": {form: _seeds(records, spreads[form]) for form, records in best.items()},
        metric: {form: "diverged" if x is None else _number(x.mean, x.deviation) for form, x in spreads.items()},
    }
    if differences:
        columns[_DIFFERENCE] = {form: _interval(x.mean, x.interval) for form, x in differences.items()}
    p_values = {form: p for form, x in differences.items() if (p := x.p_value) is not None}
    if len(p_values) > 1:
        columns[_P] = {form: f"{p:.2g}" for form, p in holm(p_values).items()}
    return columns


def _closed_shares(study: Study, best: Best, task: Task) -> Columns:
    """How much of the study's gap each form closes. No column if this cannot be computed for any form."""
    if study.gap is None or not best.keys() >= set(study.gap):
        return {}
    first, second = (best[form] for form in study.gap)
    found = {form: closed_share(best[form], first, second, task.metric) for form in best if form not in study.gap}
    shares = {form: share for form, share in found.items() if share is not None}
    return {_SHARE: {form: _percent(x.mean, x.interval) for form, x in shares.items()}} if shares else {}


def _solved(records: Sequence[Record], task: Task) -> str:
    """In how many trainings the metric ended at the threshold or better. Diverged trainings do not count as such."""
    return f"{sum(task.is_solved(record.final(task.metric)) for record in records)} of {len(records)}"


def _seeds(records: Sequence[Record], figures: Spread | None) -> str:
    count = len(figures.values) if figures else 0
    return f"{count}" if count == len(records) else f"{count} of {len(records)}, others diverged"


def _keys(record: Record) -> str:
    """The most keys that a query sees, as a mean over layers; compressed keys are counted separately."""
    model, length = record.model, record.data["sequence_length"]
    seen = {
        "dma": lambda: _mean_window(model) + model["keep_last"] + model["sinks"],
        "swa": lambda: model["sliding_window"],
        "nsa": lambda: model["nsa_window"] + model["nsa_select_count"] * model["nsa_select_block"],
    }
    keys = f"{min(length, seen.get(model['attention'], lambda: length)()):,}"
    if model["attention"] == "nsa":
        blocks = (length - model["nsa_compress_block"]) // model["nsa_compress_stride"] + 1
        keys += f" and {blocks:,} compressed"
    return keys


def _mean_window(model: Mapping[str, Any]) -> int:
    """Best-ranked keys that a query keeps, as a mean over layers."""
    wide, layers = len(model.get("wide_layers", [])), model["num_hidden_layers"]
    more = wide * (model.get("wide_keep_window_size", 0) - model["keep_window_size"])
    return round(model["keep_window_size"] + more / layers)


def _number(mean: float, deviation: float | None) -> str:
    return f"{mean:.4f}" if deviation is None else f"{mean:.4f} ± {deviation:.4f}"


def _interval(mean: float, interval: tuple[float, float] | None) -> str:
    return f"{mean:+.4f}" if interval is None else f"{mean:+.4f} [{interval[0]:+.4f}, {interval[1]:+.4f}]"


def _percent(mean: float, interval: tuple[float, float] | None) -> str:
    bounds = "" if interval is None else f" [{100 * interval[0]:.0f}, {100 * interval[1]:.0f}]"
    return f"{100 * mean:.0f} %{bounds}"


def _by_form(forms: Iterable[str], columns: Columns) -> str:
    """A table with a row for each form. A cell is empty if its column lacks the form."""
    return _markdown(["form", *columns], [[form, *(own.get(form, "") for own in columns.values())] for form in forms])


def _markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " ---: |" * (len(heads) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in rows)])
