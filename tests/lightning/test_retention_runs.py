"""The retention loss counts once in each step: recomputed layers, accumulated batches, DDP and FSDP2 change nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from once import once, shared_folder
from retention_runs import BOTH, CLIP, STEPS, TOGETHER_RUNS, train
from together import run_together
from torch import Tensor

pytestmark = pytest.mark.usefixtures("runs_in_double")

Weights = dict[str, Tensor]
ALONE: dict[str, dict[str, Any]] = {
    "recomputed": {"activation_checkpointing": True},
    "accumulated": {"accumulate": 2},
    "both": BOTH,
}


class Runs:
    """Runs of one process, made when they are first needed, and runs of two processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = once(folder, "retention-runs", self._train_together)

    def _train_together(self, folder: Path) -> None:
        run_together(Path(__file__).with_name("retention_runs.py"), folder, processes=2)

    def alone(self, name: str, **options: Any) -> str:
        """The name of a run of one process."""
        once(self.folder, name, lambda folder: train(folder, **options))
        return name

    def whole(self, parts: int, of: dict[str, Any], weight: float = 0.1) -> str:
        """The name of the run with the options of another, but with all sequences of a step in one batch."""
        mixed, alike = (of.get(name, False) for name in ("mixed", "alike"))
        options = {"parts": parts, "mixed": mixed, "alike": alike, "retention_weight": weight}
        return self.alone("whole-" + "-".join(map(str, options.values())), **options)

    def weights(self, run: str, step: int) -> Weights:
        return torch.load(self.folder / run / f"step={step}.ckpt", map_location="cpu", weights_only=True)["state_dict"]

    def norms(self, run: str) -> list[dict[str, float]]:
        return json.loads((self.folder / run / "norms.json").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(shared_folder(tmp_path_factory))


def assert_same_runs(runs: Runs, found: str, expected: str) -> None:
    """Compare all weights after one step and after several, and what was clipped and logged."""
    for step in (1, STEPS):
        weights = runs.weights(found, step)
        for name, weight in runs.weights(expected, step).items():
            torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-10, msg=lambda x, n=name: f"{n}: {x}")
    for one, other in zip(runs.norms(found), runs.norms(expected), strict=True):
        assert one == pytest.approx(other, rel=1e-8)


@pytest.mark.parametrize("how", ALONE)
def test_one_process(how: str, runs: Runs) -> None:
    parts = ALONE[how].get("accumulate", 1)
    assert_same_runs(runs, runs.alone(how, **ALONE[how]), runs.whole(parts, ALONE[how]))


@pytest.mark.parametrize("run", TOGETHER_RUNS)
def test_two_processes_are_one_with_the_whole_batch(run: str, runs: Runs) -> None:
    options = TOGETHER_RUNS[run]
    parts = 1 if "alike" in options else 2 * options.get("accumulate", 1)
    assert_same_runs(runs, run, runs.whole(parts, options))


def test_unlike_parts_have_means_of_their_own(runs: Runs) -> None:
    with pytest.raises(AssertionError):
        assert_same_runs(runs, "ddp", runs.whole(1, {}))


@pytest.mark.parametrize("run", [*TOGETHER_RUNS, *ALONE])
def test_it_takes_no_part_in_clipping_the_others(run: str, runs: Runs) -> None:
    """Contents only rank: without the loss, they have no gradient, and all else moves as far in the first step."""
    options = (TOGETHER_RUNS | ALONE)[run]
    if run in ALONE:
        runs.alone(run, **options)
    without = runs.whole(1, options, weight=0.0)
    found, expected = runs.norms(run)[0], runs.norms(without)[0]
    assert expected["content before"] == 0
    assert found["content before"] > 2 * CLIP
    assert found["others before"] > 2 * CLIP
    assert found["content after"] == pytest.approx(CLIP, rel=1e-3)
    for name in ("others before", "others after", "logged"):
        assert found[name] == pytest.approx(expected[name], rel=1e-8)
    assert found["logged"] == pytest.approx(found["others before"], rel=1e-8)
    weights = runs.weights(run, 1)
    for name, weight in runs.weights(without, 1).items():
        if "drifting.weight" in name:
            assert weights[name].abs().max() > weight.abs().max() == 0
        else:
            torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-10)
