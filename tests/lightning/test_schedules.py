"""Learning-rate schedules and metrics."""

from types import SimpleNamespace

import pytest

from dma_lightning import LanguageModel
from dma_lightning.schedules import lr_factor


def test_wsd() -> None:
    factors = [lr_factor("wsd", step, 100, 0.1, 0.2) for step in range(101)]
    assert factors[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert factors[10:81] == [1.0] * 71
    assert factors[80:] == pytest.approx([1 - 0.05 * i for i in range(21)])


def test_cosine() -> None:
    factors = [lr_factor("cosine", step, 100, 0.1, 0.2) for step in range(101)]
    assert factors[9] == factors[10] == 1
    assert factors[55] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
@pytest.mark.parametrize("max_steps", [1, 2, 3])
def test_short_runs_and_steps_beyond_the_end(schedule: str, max_steps: int) -> None:
    assert all(0 <= lr_factor(schedule, step, max_steps, 0.1, 0.2) <= 1 for step in range(10))
    assert lr_factor(schedule, 0, max_steps, 0.1, 0.2) > 0


def test_the_number_of_steps_is_that_of_the_trainer() -> None:
    """To ask Lightning for an estimate would begin the training data before their position is restored."""
    module = LanguageModel(vocab_size=16)
    module._trainer = SimpleNamespace(max_steps=10)  # has no estimated_stepping_batches
    assert module.configure_optimizers()["lr_scheduler"]["interval"] == "step"


def test_constant() -> None:
    assert lr_factor("constant", 5, -1, 0.1, 0.2) == 1
