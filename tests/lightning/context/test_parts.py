"""Models that several processes train on parts of sequences equal those of one process."""

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from context_runs import RUNS, Run, model_of, train
from once import once, shared_folder
from together import run_together
from torch import Tensor
from train_parts import PROCESSES

from dma_kernels.context import ContextGroup

HERE = Path(__file__).parent
GROUP = ContextGroup("", 0, 2)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Tensor]]]:
    """The results of each process, by the name of the run."""
    train_all = functools.partial(run_together, HERE / "train_parts.py", processes=PROCESSES)
    folder = once(shared_folder(tmp_path_factory), "parts", train_all)
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.mark.parametrize("number", range(len(RUNS)), ids=[run.name for run in RUNS])
def test_parts_train_as_the_whole(number: int, found: list[dict[str, list[Tensor]]]) -> None:
    run = RUNS[number]
    ranks = range(PROCESSES) if run.parts == PROCESSES else (2 * (number % 2), 2 * (number % 2) + 1)
    logits, *weights = train(run)
    parts = torch.cat([found[rank][run.name][0] for rank in ranks], dim=1)[:, : run.length]
    torch.testing.assert_close(parts, logits, rtol=0, atol=1e-10)
    for rank in ranks:
        for weight, wanted in zip(found[rank][run.name][1:], weights, strict=True):
            torch.testing.assert_close(weight, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["retention", "output"])
def test_the_retention_loss_trains(name: str) -> None:
    run = next(run for run in RUNS if run.name == name)
    without = replace(run, options=run.options | {"retention_weight": 0.0})
    assert any((x - y).abs().max() > 1e-3 for x, y in zip(train(run), train(without), strict=True))


@pytest.mark.parametrize("attention", ["mha", "mla", "nsa"])
def test_attentions_that_need_all_earlier_keys_are_refused(attention: str) -> None:
    model = model_of(Run("", options={"attention": attention}))
    with pytest.raises(ValueError, match=r"attention: expected dma or swa .* got \w+Attention.*do not divide it"):
        model.join_context(GROUP)
    assert model.context is None
    model.join_context(None)


def test_parts_together_are_not_too_long() -> None:
    model = model_of(Run(""))
    model.join_context(GROUP)
    with pytest.raises(ValueError, match="at most max_position_embeddings = 40 tokens in 2 parts, 20 in each, got 21"):
        model(torch.zeros(1, 21, dtype=torch.int64))


@pytest.mark.parametrize("attention", ["dma", "swa"])
def test_a_cache_reads_whole_sequences(attention: str) -> None:
    model = model_of(Run("", options={"attention": attention, "drift": "gate", "score_form": "linear"}))
    tokens = torch.arange(20)[None]
    alone = model(tokens, cache=model.new_cache(1))
    model.join_context(GROUP)
    assert torch.equal(model(tokens, cache=model.new_cache(1)), alone)
