"""Statistics over several seeds."""

import math

import msgspec
import pytest
from scipy import stats
from study_records import record

from benchmarks.evidence.comparisons import (
    ClosedShare,
    Difference,
    at_best_rate,
    closed_share,
    holm,
    paired,
    spread,
)
from benchmarks.evidence.studies import Task

TASK = Task("val/accuracy", "higher")


def test_spread_of_one_seed_is_unknown() -> None:
    one, both = ([record("dma", seed, value) for seed, value in enumerate(x)] for x in ((0.5,), (0.5, 0.7)))
    found = spread(one, "val/accuracy")
    assert found is not None
    assert found.deviation is None
    both = spread(both, "val/accuracy")
    assert both is not None
    assert both.mean == pytest.approx(0.6)
    assert both.deviation == pytest.approx(0.02**0.5)


def test_differences_are_those_of_common_seeds() -> None:
    dma = [record("dma", seed, value) for seed, value in ((0, 0.5), (1, 0.6), (7, 0.9))]
    mha = [record("mha", seed, value) for seed, value in ((1, 0.4), (0, 0.4), (8, 0.0))]
    found = paired(dma, mha, "val/accuracy")
    assert found is not None
    assert found.values == pytest.approx((0.1, 0.2))
    assert paired(dma[2:], mha, "val/accuracy") is None


def test_interval_is_students() -> None:
    low, high = Difference((0.1, 0.2, 0.3)).interval or (0, 0)
    # t of 97.5 % with two degrees of freedom, from a table
    assert (low, high) == pytest.approx((0.2 - 4.3027 * 0.1 / 3**0.5, 0.2 + 4.3027 * 0.1 / 3**0.5), abs=1e-4)
    assert Difference((0.1,)).interval is None
    assert Difference((0.1, 0.1)).interval == (0.1, 0.1)


def test_best_rate_is_that_of_the_seeds_that_all_rates_have() -> None:
    sweep = [record("dma", 0, 0.5, lr=0.1), record("dma", 0, 0.6, lr=0.2)]
    more = [record("dma", seed, 0.0, lr=0.2) for seed in (1, 2)]  # worse by luck, but not another rate
    assert [(x.lr, x.seed) for x in at_best_rate([*more, *sweep], TASK)] == [(0.2, 0), (0.2, 1), (0.2, 2)]
    lowest = at_best_rate(sweep, Task("val/accuracy", "lower"))
    assert [x.lr for x in lowest] == [0.1]


def test_what_has_diverged_is_no_figure() -> None:
    diverged = record("dma", 1, 0.0, curves={"val/accuracy": [(1, 0.5), (2, None)]})
    cut = record("dma", 2, 0.0, curves={"val/accuracy": [(1, 0.5)]})
    good, mha = record("dma", 0, 0.7), [record("mha", seed, 0.5) for seed in range(3)]
    assert [math.isnan(x.final("val/accuracy")) for x in (diverged, cut, good)] == [True, True, False]
    found = spread([good, diverged, cut], "val/accuracy")
    assert found is not None
    assert found.values == (0.7,)
    assert spread([diverged], "val/accuracy") is None
    difference = paired([good, diverged, cut], mha, "val/accuracy")
    assert difference is not None
    assert difference.values == pytest.approx((0.2,))
    other = record("dma", 1, 0.1, lr=0.2)
    assert at_best_rate([diverged, other], TASK) == [other]
    assert at_best_rate([diverged], TASK) == [diverged]


def test_p_values_are_those_of_paired_t_tests() -> None:
    form, baseline = (0.5, 0.7, 0.4, 0.9), (0.3, 0.6, 0.5, 0.4)
    found = Difference(tuple(x - y for x, y in zip(form, baseline, strict=True)))
    assert found.p_value == pytest.approx(stats.ttest_rel(form, baseline).pvalue)
    assert Difference((0.1,)).p_value is None
    assert Difference((0.0, 0.0)).p_value == 1
    assert Difference((0.5, 0.5)).p_value == 0


def test_p_values_are_corrected_step_by_step() -> None:
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})  # c twice, b not below it
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1, "b": 1}
    assert holm({"a": 0.04}) == {"a": 0.04}


def test_share_of_a_gap_lies_where_no_difference_is_found() -> None:
    share = ClosedShare((0.2, 0.5, 0.3, 0.6), (1.0, 1.4, 0.9, 1.1))
    assert share.mean == pytest.approx(1.6 / 4.4)
    low, high = share.interval or (0, 0)
    assert low < share.mean < high
    for bound in (low, high):
        rest = Difference(tuple(x - bound * y for x, y in zip(share.closed, share.gap, strict=True)))
        assert rest.p_value == pytest.approx(0.05)
    assert ClosedShare(share.gap, share.gap).interval == pytest.approx((1, 1))
    assert ClosedShare((0.0, 0.0), (0.5, 0.51)).interval == (0, 0)
    assert ClosedShare((0.2,), (1.0,)).interval is None
    assert ClosedShare((0.2, 0.3), (-1.0, 2.0)).interval is None  # there may be no gap


def test_share_of_a_gap_is_that_of_seeds_that_all_three_have() -> None:
    first, second, form = (
        [record(name, seed, value) for seed, value in enumerate(values)]
        for name, values in (("swa", (0.1, 0.2, 0.3)), ("mha", (0.9, 1.0, 0.9)), ("dma", (0.5, 0.4)))
    )
    found = closed_share(form, first, second, "val/accuracy")
    assert found is not None
    assert found.closed == pytest.approx((-0.4, -0.2))
    assert found.gap == pytest.approx((-0.8, -0.8))
    diverged = record("dma", 2, 0.0, curves={"val/accuracy": [(2, None)]})
    assert closed_share([*form, diverged], first, second, "val/accuracy") == found
    early = [*second[:1], msgspec.structs.replace(second[1], steps=1, curves={"val/accuracy": [(1, 1.0)]})]
    assert closed_share(form, first, early, "val/accuracy") is None
    assert closed_share(form, first, first, "val/accuracy") is None
    assert closed_share(form, first, second[2:], "val/accuracy") is None
