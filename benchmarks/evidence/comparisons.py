"""What the records of a study say: figures at the best rate, and differences between forms, seed by seed."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scipy import stats

from benchmarks.evidence.results import Record
from benchmarks.evidence.studies import Task

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """Figures of several seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Their mean."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Standard deviation of one figure, estimated from all; none for a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Difference:
    """Differences between two forms, each of one seed.

    Attributes:
        values: of the seeds that both have, form less baseline.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Their mean."""
        return statistics.fmean(self.values)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Where the mean over all seeds lies with 95 % confidence, by Student's t; none for a single seed."""
        if len(self.values) < 2:
            return None
        error = statistics.stdev(self.values) / len(self.values) ** 0.5
        if error == 0:
            return self.mean, self.mean
        low, high = stats.t.interval(CONFIDENCE, len(self.values) - 1, self.mean, error)
        return float(low), float(high)


def by_form(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Records of each form, in the order in which they come."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record.form, []).append(record)
    return found


def by_rate(records: Iterable[Record]) -> dict[float, list[Record]]:
    """Records of each learning rate, from the smallest."""
    found: dict[float, list[Record]] = {}
    for record in sorted(records, key=lambda record: (record.lr, record.seed)):
        found.setdefault(record.lr, []).append(record)
    return found


def at_best_rate(records: Iterable[Record], task: Task) -> list[Record]:
    """Records of a form at its best rate, by the seeds that all rates have; ordered by seed.

    A rate at which one has diverged is the best only if there is no other.
    """
    rates = by_rate(records)
    common = set.intersection(*({record.seed for record in own} for own in rates.values()))
    means = {
        lr: statistics.fmean(record.final(task.metric) for record in own if record.seed in common or not common)
        for lr, own in rates.items()
    }
    finite = {lr: mean for lr, mean in means.items() if math.isfinite(mean)}
    return rates[task.best(finite) if finite else min(rates)]


def spread(records: Sequence[Record], metric: str) -> Spread | None:
    """Figures at the ends of several trainings, those that have diverged left out; none without any."""
    values = tuple(value for record in records if math.isfinite(value := record.final(metric)))
    return Spread(values) if values else None


def paired(form: Sequence[Record], baseline: Sequence[Record], metric: str) -> Difference | None:
    """How a form differs from the baseline, over the seeds that both have finished; none without such."""
    other = {record.seed: record.final(metric) for record in baseline}
    differences = [record.final(metric) - other[record.seed] for record in form if record.seed in other]
    values = tuple(value for value in differences if math.isfinite(value))
    return Difference(values) if values else None
