"""What the records of a study say: figures at the best learning rate, and differences between forms, seed by seed."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
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
        """Standard deviation of a single figure, estimated from all of them. None if there is only one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Difference:
    """Differences between two forms, one for each seed.

    Attributes:
        values: form minus baseline, for the seeds that both have.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Their mean."""
        return statistics.fmean(self.values)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % confidence interval of the mean over all possible seeds, by Student's t. None for a single seed."""
        if len(self.values) < 2:
            return None
        if self._error == 0:
            return self.mean, self.mean
        low, high = stats.t.interval(CONFIDENCE, len(self.values) - 1, self.mean, self._error)
        return float(low), float(high)

    @property
    def p_value(self) -> float | None:
        """Probability of a mean at least this far from 0 if the forms do not differ (paired t test). None for one seed.

        If all seeds have the same difference, it is 1 if this difference is 0, and 0 otherwise.
        """
        if len(self.values) < 2:
            return None
        if self._error == 0:
            return float(self.mean == 0)
        return float(2 * stats.t.sf(abs(self.mean) / self._error, len(self.values) - 1))

    @property
    def _error(self) -> float:
        """Standard error of the mean."""
        return statistics.stdev(self.values) / len(self.values) ** 0.5


@dataclass(frozen=True)
class ClosedShare:
    """How much of the gap between two forms a third form closes: 0 if it equals the first form, 1 if the second.

    The interval is Fieller's: all shares r for which the mean of `closed - r gap` does not differ significantly from 0
    by Student's t. It takes into account that the gap is uncertain too, and comes from the same seeds. An interval of
    `closed` alone, divided by the mean gap, would not. It would be too narrow if the gap is, say, only twice its error.
    And for the second form itself, which closes exactly the whole gap, it would not be just 1.

    Attributes:
        closed: first minus form, for each seed.
        gap: first minus second, for the same seeds. The mean must not be 0.

    Source: E. C. Fieller, "Some problems in interval estimation", 1954.
    """

    closed: tuple[float, ...]
    gap: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Quotient of the means. In a mean of quotients, the seed with the smallest gap would dominate."""
        return statistics.fmean(self.closed) / statistics.fmean(self.gap)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % confidence interval. None for a single seed, or if the gap may be 0, which leaves it unbounded."""
        n = len(self.gap)
        if n < 2:
            return None
        closed, gap = statistics.fmean(self.closed), statistics.fmean(self.gap)
        k = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) ** 2 / n
        # (closed - r gap)^2 <= k var(closed - r gap) is the same as a r^2 - 2 b r + c <= 0.
        a = gap**2 - k * statistics.variance(self.gap)
        b = closed * gap - k * statistics.covariance(self.closed, self.gap)
        c = closed**2 - k * statistics.variance(self.closed)
        if a <= 0:
            return None
        root = max(0.0, b**2 - a * c) ** 0.5
        return (b - root) / a, (b + root) / a


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
    """Records of a form at its best learning rate, ordered by seed. Rates are compared by the seeds that all have.

    A rate at which a training has diverged is chosen only if there is no other.
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
    """Final figures of several trainings, without those that diverged. None if no figure is left."""
    values = tuple(value for record in records if math.isfinite(value := record.final(metric)))
    return Spread(values) if values else None


def paired(form: Sequence[Record], baseline: Sequence[Record], metric: str) -> Difference | None:
    """How a form differs from the baseline, over the seeds that both have finished. None if there is no such seed."""
    other = {record.seed: record.final(metric) for record in baseline}
    differences = [record.final(metric) - other[record.seed] for record in form if record.seed in other]
    values = tuple(value for value in differences if math.isfinite(value))
    return Difference(values) if values else None


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Correct the p values of several tests, so that they hold for all tests together.

    The smallest of m values is multiplied by m, the next one by m - 1, and so on. Each result is at most 1, and at
    least as large as the one before it.

    Source: S. Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    corrected: dict[str, float] = {}
    least = 0.0
    for place, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        least = corrected[name] = max(least, min(1.0, (len(p_values) - place) * p))
    return corrected


def closed_share(
    form: Sequence[Record], first: Sequence[Record], second: Sequence[Record], metric: str
) -> ClosedShare | None:
    """How much of the gap from the first form to the second a form closes, over the seeds that all three have finished.

    None if there is no such seed or no gap, or if these trainings differ in their number of steps. Trainings stop early
    if they solve the task, so those that all have the same number of steps would be the worst ones.
    """
    own, least, most = (
        {x.seed: x for x in records if math.isfinite(x.final(metric))} for records in (form, first, second)
    )
    common = [(own[seed], least[seed], most[seed]) for seed in sorted(own.keys() & least.keys() & most.keys())]
    if len({record.steps for records in common for record in records}) != 1:
        return None
    values = [[record.final(metric) for record in records] for records in common]
    gap = tuple(start - end for _, start, end in values)
    return ClosedShare(tuple(start - value for value, start, _ in values), gap) if statistics.fmean(gap) else None
