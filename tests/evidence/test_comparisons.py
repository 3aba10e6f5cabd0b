"""What is said about several seeds."""

import pytest
from study_records import record

from benchmarks.evidence.comparisons import Difference, at_best_rate, paired, spread
from benchmarks.evidence.studies import Task

TASK = Task("val/accuracy", "higher")


def test_spread_of_one_seed_is_unknown() -> None:
    assert spread([record("dma", 0, 0.5)], "val/accuracy").deviation is None
    both = spread([record("dma", 0, 0.5), record("dma", 1, 0.7)], "val/accuracy")
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
