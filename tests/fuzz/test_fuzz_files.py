"""A few damaged and hostile files of each kind, and races; `benchmarks/fuzz.py` runs as many as one likes."""

import json
from pathlib import Path

import pytest
from fuzz import table
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


def test_figures_of_the_page_are_those_of_the_result_file() -> None:
    root = Path(__file__).parents[2]
    result = json.loads((root / "benchmarks/results/fuzz.json").read_text())
    assert "\n".join(table(result)) in (root / "docs/reliability.md").read_text()


@pytest.mark.parametrize(("area", "seed"), CASES)
def test_is_read_exactly_or_refused(area: str, seed: int) -> None:
    AREAS[area].check(seed)
