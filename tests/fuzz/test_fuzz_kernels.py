"""A few drawn cases of each mathematical area. `benchmarks/fuzz.py` runs any number of cases."""

import pytest
from fuzz_areas import AREAS

CASES = [
    (area, seed)
    for area, count in (
        ("selection", 60), ("drift", 40), ("masks", 50), ("intervals", 50), ("backends", 50), ("gates", 40),
        ("retention", 40), ("retention_triton", 4),
        ("key_caches", 50), ("drift_caches", 30), ("mixers", 40),
    )
    for seed in range(count)
]  # fmt: skip


@pytest.mark.parametrize(("area", "seed"), CASES)
def test_equals_its_definition(area: str, seed: int) -> None:
    AREAS[area].check(seed)
