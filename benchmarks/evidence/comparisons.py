"""What the records of a study say: figures at the best rate, and differences between forms, seed by seed."""

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
        if self._error == 0:
            return self.mean, self.mean
        low, high = stats.t.interval(CONFIDENCE, len(self.values) - 1, self.mean, self._error)
        return float(low), float(high)

    @property
    def p_value(self) -> float | None:
        """How likely a mean at least so far from 0 is where there is no difference (paired t test); none for one seed.

        Where all seeds differ by the same, it is 1 if that is 0, and else 0.
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
    """How much of the gap between two forms a third one closes: 0 is as the first of them, 1 as the second.

    The interval is Fieller's: all shares r for which the mean of `closed - r gap` does not differ from 0 by Student's
    t. It counts that the gap is uncertain, too, and of the same seeds. An interval of `closed` alone, divided by the
    mean gap, would not: it is too narrow where the gap is, say, twice its error, and it gives the second form itself,
    which closes exactly the whole gap, an interval around 1.

    Attributes:
        closed: first less form, of each seed.
        gap: first less second, of the same seeds; their mean is not 0.

    Source: E. C. Fieller, "Some problems in interval estimation", 1954.
    """

    closed: tuple[float, ...]
    gap: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The quotient of the means; the mean of quotients would be that of the seed with the smallest gap."""
        return statistics.fmean(self.closed) / statistics.fmean(self.gap)

    @property
    def interval(self) -> tuple[float, float] | None:
        """With 95 % confidence; none for a single seed, or if there may be no gap, since it has no bounds then."""
        n = len(self.gap)
        if n < 2:
            return None
        closed, gap = statistics.fmean(self.closed), statistics.fmean(self.gap)
        k = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) ** 2 / n
        # (closed - r gap)^2 <= k var(closed - r gap) is a r^2 - 2 b r + c <= 0.
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


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Correct the p values of several tests so that they hold for all of them together.

    The smallest of m is multiplied by m, the next by m - 1, and so on, up to 1; none is below the one before it.

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

    None without such a seed or a gap, and where these trainings differ in their number of steps: if some have ended
    early because they had solved the task, those of equal steps would be the worst.
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
