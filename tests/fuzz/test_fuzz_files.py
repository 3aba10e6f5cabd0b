"""A few damaged and hostile files of each kind, and a few races. `benchmarks/fuzz.py` runs any number of cases."""

import pytest
from fuzz_areas import AREAS

pytestmark = pytest.mark.filterwarnings("ignore:.*the text is read again")

CASES = [
    (area, seed)
    for area, count in (
        ("prepared", 60), ("preparing", 12), ("text", 20), ("tokenizers", 40), ("exports", 60),
        ("checkpoint_bytes", 40), ("checkpoint_values", 20), ("resuming", 10), ("commands", 3), ("races", 4),
    )
    for seed in range(count)
]  # fmt: skip


@pytest.mark.parametrize(("area", "seed"), CASES)
def test_is_read_exactly_or_refused(area: str, seed: int) -> None:
    AREAS[area].check(seed)
