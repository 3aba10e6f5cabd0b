"""Associative recall: examples equal those of the original generator, and are drawn lazily from disjoint seeds."""

import numpy as np
import pytest
import torch

from dma_lightning import MQARDataModule
from dma_lightning.data import IGNORE_INDEX, MQARTask


def make_task(**changed: object) -> MQARTask:
    """A small task with the defaults of the original."""
    arguments = {"vocab_size": 64, "sequence_length": 32, "num_pairs": 6, "power": 0.01, "random_fillers": True}
    return MQARTask(**(arguments | changed))


def labeled(labels: np.ndarray) -> dict[int, int]:
    """Position and value of every label."""
    return {int(i): int(labels[i]) for i in np.flatnonzero(labels != IGNORE_INDEX)}


def test_golden_examples_of_the_original() -> None:
    task = make_task(vocab_size=20, sequence_length=16, num_pairs=2, random_fillers=False)
    inputs, labels = task.generate(seed=0, count=2)
    assert inputs.tolist() == [
        [8, 15, 3, 12, 0, 0, 8, 0, 0, 0, 3, 0, 0, 0, 0, 0],
        [4, 15, 2, 11, 4, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert labeled(labels[0]) == {6: 15, 10: 12}
    assert labeled(labels[1]) == {4: 15, 8: 11}
    task = make_task(vocab_size=40, sequence_length=24, num_pairs=4, random_fillers=False)
    inputs, labels = task.generate(seed=1, count=1)
    assert inputs[0].tolist() == [4, 35, 16, 28, 7, 36, 11, 23, 11, 0, 4, 0, 0, 0, 0, 0, 7, 0, 16, 0, 0, 0, 0, 0]
    assert labeled(labels[0]) == {8: 23, 10: 35, 16: 36, 18: 28}


def test_every_query_asks_for_a_pair_of_the_context() -> None:
    inputs, labels = make_task().generate(seed=5, count=50)
    for row, label in zip(inputs, labels, strict=True):
        pairs = dict(zip(row[:12:2].tolist(), row[1:12:2].tolist(), strict=True))
        asked = labeled(label)
        assert sorted(asked.values()) == sorted(pairs.values())
        assert all(pairs[row[i]] == value and i >= 12 and i % 2 == 0 for i, value in asked.items())
        assert all(1 <= key < 32 <= value < 64 for key, value in pairs.items())


def test_fillers_are_random_and_leave_the_rest_alone() -> None:
    plain, labels = make_task(random_fillers=False).generate(seed=3, count=20)
    filled, same_labels = make_task().generate(seed=3, count=20)
    assert np.array_equal(labels, same_labels)
    assert np.array_equal(filled[plain > 0], plain[plain > 0])
    assert len(np.unique(filled[plain == 0])) > 50


def test_examples_are_drawn_by_index_from_disjoint_seeds() -> None:
    data = MQARDataModule(train_examples=50, val_examples=20, test_examples=20, seed=1)
    data.setup("fit")
    ranges = [range(s.first_seed, s.first_seed + len(s)) for s in (data.train_set, data.val_set, data.test_set)]
    assert len(set().union(*ranges)) == 90
    other = MQARDataModule(train_examples=50, val_examples=20, test_examples=20, seed=0)
    other.setup("fit")
    assert not set(ranges[0]) & set(range(other.train_set.first_seed, other.train_set.first_seed + 50))
    item = data.val_set[7]
    inputs, labels = data.task.generate(data.val_set.first_seed + 7, 1)
    assert torch.equal(item["input_ids"], torch.from_numpy(inputs[0]))
    assert torch.equal(item["labels"], torch.from_numpy(labels[0]))
    with pytest.raises(IndexError):
        data.val_set[20]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sequence_length": 31}, "even sequence_length below vocab_size, got 31 and 64"),
        ({"vocab_size": 32}, "even sequence_length below vocab_size, got 32 and 32"),
        ({"num_pairs": 9}, "num_pairs: expected 1 <= num_pairs <= sequence_length / 4 = 8, got 9"),
        ({"num_pairs": 0}, "num_pairs: expected 1 <="),
    ],
)
def test_impossible_tasks(changed: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_task(**changed)


@pytest.mark.parametrize("changed", [{"train_examples": 0}, {"seed": -1}, {"seed": 2**20, "train_examples": 2**12}])
def test_bad_counts(changed: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected at least one example in each split"):
        MQARDataModule(**changed)


def test_training_examples_of_a_mixture_go_through_its_kinds() -> None:
    shape = {"vocab_size": 64, "sequence_length": 32, "num_pairs": 8}
    kinds = [[16, 2], [32, 4], [32, 8]]
    data = MQARDataModule(**shape, mixture=kinds)
    data.setup("fit")
    for index in range(9):
        item, (length, pairs) = data.train_set[index], kinds[index % 3]
        assert item["padding"].tolist() == [False] * length + [True] * (32 - length)
        assert (item["labels"] != IGNORE_INDEX).sum() == pairs
        alone = MQARTask(64, length, pairs, 0.01, True).generate(index, 1)
        assert item["input_ids"][:length].tolist() == alone[0][0].tolist()
        assert item["labels"][:length].tolist() == alone[1][0].tolist()
        assert not item["input_ids"][length:].any()
    plain = MQARDataModule(**shape)
    plain.setup("fit")
    assert data.val_set[3].keys() == plain.val_set[3].keys()
    assert data.val_set[3]["input_ids"].equal(plain.val_set[3]["input_ids"])
    assert data.fingerprint != plain.fingerprint
    assert "mixture" not in plain.fingerprint  # as before there were any


@pytest.mark.parametrize("mixture", [[[16]], [[64, 4]], [[16, 2, 1]]])
def test_impossible_mixtures(mixture: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="mixture: expected pairs of a length, at most sequence_length = 32, "):
        MQARDataModule(vocab_size=64, sequence_length=32, num_pairs=8, mixture=mixture)
    with pytest.raises(ValueError, match="num_pairs: expected 1 <= num_pairs <= sequence_length / 4 = 4, got 5"):
        MQARDataModule(vocab_size=64, sequence_length=32, num_pairs=8, mixture=[[16, 5]])
