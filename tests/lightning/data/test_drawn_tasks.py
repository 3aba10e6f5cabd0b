"""Selective copy and induction: examples are correct, and are drawn lazily from disjoint seeds."""

import numpy as np
import pytest
import torch

from dma_lightning import InductionDataModule, SelectiveCopyDataModule
from dma_lightning.data import IGNORE_INDEX
from dma_lightning.data.drawn import DrawnDataModule
from dma_lightning.data.induction import InductionTask
from dma_lightning.data.selective_copy import SelectiveCopyTask

MODULES = [SelectiveCopyDataModule, InductionDataModule]
GOLDEN_COPY = [
    [0, 5, 0, 6, 0, 0, 0, 0, 0, 0, 1, 4, 7, 7, 7, 7],
    [0, 0, 4, 4, 2, 0, 4, 0, 0, 0, 0, 0, 7, 7, 7, 7],
]
GOLDEN_INDUCTION = [[4, 5, 0, 3, 3, 3, 1, 3, 7, 2, 4, 7], [0, 0, 4, 2, 1, 6, 6, 0, 1, 7, 1, 7]]


def test_golden_copies() -> None:
    inputs, labels = SelectiveCopyTask(8, 16, 4, selective=True).generate(seed=0, count=2)
    assert inputs.tolist() == GOLDEN_COPY
    assert labels[:, -4:].tolist() == [[x for x in row[:-4] if x] for row in inputs.tolist()]
    assert (labels[:, :-4] == IGNORE_INDEX).all()
    plain, _ = SelectiveCopyTask(8, 16, 4, selective=False).generate(seed=0, count=2)
    assert plain[:, :4].tolist() == labels[:, -4:].tolist()
    assert (plain[:, 4:12] == 0).all()


def test_golden_inductions() -> None:
    inputs, labels = InductionTask(8, 12).generate(seed=0, count=2)
    assert inputs.tolist() == GOLDEN_INDUCTION
    assert labels[:, -1].tolist() == [row[row.index(7) + 1] for row in inputs.tolist()]
    assert (labels[:, :-1] == IGNORE_INDEX).all()


@pytest.mark.parametrize("selective", [False, True])
def test_all_that_is_copied_stands_among_blanks(selective: bool) -> None:
    inputs, labels = SelectiveCopyTask(5, 12, 6, selective).generate(seed=3, count=200)
    for row, label in zip(inputs.tolist(), labels.tolist(), strict=True):
        assert [x for x in row[:6] if x] == label[6:]
        assert set(label[6:]) <= {1, 2, 3}
        assert row[6:] == [4] * 6


def test_copies_stand_everywhere_in_every_order() -> None:
    inputs, _ = SelectiveCopyTask(4, 8, 2, selective=True).generate(seed=1, count=600)
    places = {tuple(np.flatnonzero(row[:6])) for row in inputs}
    assert len(places) == 15


def test_triggers_stand_everywhere_once_before_the_end() -> None:
    inputs, labels = InductionTask(4, 9).generate(seed=1, count=500)
    assert ((inputs == 3).sum(1) == 2).all()
    assert {int(np.flatnonzero(row == 3)[0]) for row in inputs} == set(range(7))
    assert set(labels[:, -1]) == {0, 1, 2}
    nearest, _ = InductionTask(4, 3).generate(seed=0, count=5)
    assert (nearest[:, [0, 2]] == 3).all()


@pytest.mark.parametrize("kind", MODULES)
def test_examples_are_drawn_by_index_from_disjoint_seeds(kind: type[DrawnDataModule]) -> None:
    data = kind(train_examples=50, val_examples=20, test_examples=20, seed=1)
    data.setup("fit")
    ranges = [range(s.first_seed, s.first_seed + len(s)) for s in (data.train_set, data.val_set, data.test_set)]
    assert len(set().union(*ranges)) == 90
    item = data.val_set[7]
    inputs, labels = data.task.generate(data.val_set.first_seed + 7, 1)
    assert torch.equal(item["input_ids"], torch.from_numpy(inputs[0]))
    assert torch.equal(item["labels"], torch.from_numpy(labels[0]))
    assert item["input_ids"].dtype == item["labels"].dtype == torch.int64
    other = kind(train_examples=50, seed=2)
    assert other.fingerprint != data.fingerprint == kind(val_examples=9, seed=1).fingerprint


@pytest.mark.parametrize(
    ("kind", "changed", "message"),
    [
        (
            SelectiveCopyDataModule,
            {"num_tokens": 129},
            "expected 1 <= num_tokens <= sequence_length / 2 = 128",
        ),
        (SelectiveCopyDataModule, {"num_tokens": 0}, "num_tokens: expected 1 <="),
        (SelectiveCopyDataModule, {"vocab_size": 2}, "vocab_size: expected at least 3"),
        (
            InductionDataModule,
            {"sequence_length": 2},
            "sequence_length >= 3, got 16 and 2",
        ),
        (InductionDataModule, {"vocab_size": 1}, "expected vocab_size >= 2"),
        (InductionDataModule, {"train_examples": 0}, "expected at least one example in each split"),
    ],
)
def test_impossible_tasks(kind: type[DrawnDataModule], changed: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**changed)
