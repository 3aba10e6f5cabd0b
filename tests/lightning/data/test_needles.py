"""Needles: examples are correct, and have the requested lengths and depths."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dma_lightning import NeedleDataModule
from dma_lightning.cli import build_cli
from dma_lightning.data import IGNORE_INDEX
from dma_lightning.data.needles import ASK, BOS, DEPTHS, END, KEY, PAD, VAL, NeedleTask

SMALL = {"key_symbols": 5, "value_symbols": 4, "filler_symbols": 6, "key_length": 2, "value_length": 3}
KEYS, VALUES, FILLERS = range(6, 11), range(11, 15), range(15, 21)


def make_task(length: int = 60, **changed: object) -> NeedleTask:
    """A small task."""
    return NeedleTask(length, **(SMALL | changed))


def read(inputs: np.ndarray) -> tuple[list[tuple[int, tuple, tuple]], tuple, list[int]]:
    """Parse an example: needles with their places, keys and values; the key that is asked for; the fillers."""
    tokens, needles, fillers, at = inputs.tolist(), [], [], 1
    assert tokens[0] == BOS
    while tokens[at] != ASK:
        if tokens[at] != KEY:
            fillers.append(tokens[at])
            at += 1
            continue
        assert (tokens[at + 3], tokens[at + 7]) == (VAL, END)
        needles.append((at, tuple(tokens[at + 1 : at + 3]), tuple(tokens[at + 4 : at + 7])))
        at += 8
    assert tokens[at + 3] == VAL
    return needles, tuple(tokens[at + 1 : at + 3]), fillers


def test_golden_example() -> None:
    inputs, labels = make_task(24).generate(seed=0, length=24, depth=50)
    assert inputs.tolist() == [1, 18, 18, 18, 16, 2, 8, 8, 3, 14, 12, 11, 5, 18, 20, 17, 19, 15, 4, 8, 8, 3, 14, 12]
    assert labels.tolist() == [IGNORE_INDEX] * 21 + [14, 12, 11]
    assert make_task(24).vocab_size == 21


@pytest.mark.parametrize("changed", [{}, {"num_needles": 4}, {"values_per_key": 3}, {"haystack": "needles"}])
@pytest.mark.parametrize("length", [45, 60])
def test_the_answer_is_what_was_told_with_the_key(changed: dict[str, object], length: int) -> None:
    task = make_task(**changed)
    for seed in range(40):
        inputs, labels = task.generate(seed, length)
        needles, asked, fillers = read(inputs)
        answer = [token for _, key, value in needles if key == asked for token in value]
        assert len(inputs) == length
        assert labels[-len(answer) :].tolist() == answer
        assert (labels[: -len(answer)] == IGNORE_INDEX).all()
        assert inputs[1 - len(answer) :].tolist() == answer[:-1]
        assert len(answer) == 3 * task.values_per_key
        assert len({key for _, key, _ in needles}) == len(needles) - task.values_per_key + 1
        assert {x for _, key, _ in needles for x in key} <= {*KEYS}
        assert {x for _, _, value in needles for x in value} <= {*VALUES}
        assert {*fillers} <= {*FILLERS}
        assert len(fillers) < 8 or changed.get("haystack") != "needles"


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_needle_stands_at_its_depth(depth: int) -> None:
    task = make_task()
    fillers = 60 - task.least_length
    for seed in range(5):
        (needle,), _, _ = read(task.generate(seed, 60, depth)[0])
        assert needle[0] == 1 + round(depth / 100 * fillers)
    needles, asked, _ = read(make_task(90, haystack="needles").generate(0, 90, depth)[0])
    assert [key for _, key, _ in needles].index(asked) == round(depth / 100 * (len(needles) - 1))


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_first_of_several_values_stands_at_its_depth(depth: int) -> None:
    task = make_task(120, values_per_key=3, num_needles=2)
    for seed in range(5):
        inputs, _ = task.generate(seed, 120, depth)
        needles, asked, _ = read(inputs)
        first = next(place for place, key, _ in needles if key == asked)
        before = sum(inputs[:first] >= 6 + task.key_symbols + task.value_symbols)  # fillers
        assert before == round(depth / 100 * (120 - task.least_length))


def test_drawn_lengths_and_depths_reach_their_ends() -> None:
    task = make_task(40)
    lengths, places = set(), set()
    for seed in range(900):
        inputs, _ = task.generate(seed)
        lengths.add(len(inputs))
        places.add(read(inputs)[0][0][0])
    assert lengths == {*range(task.least_length, 41)}
    assert {1, 40 - task.least_length} <= places


def test_validation_goes_through_depths_and_lengths() -> None:
    data = NeedleDataModule(64, **SMALL, train_examples=50, val_examples=66, test_examples=33)
    data.setup("fit")
    seen = []
    for index in range(66):
        item = data.val_set[index]
        length = int((~item["padding"]).sum())
        assert item["input_ids"].shape == item["labels"].shape == item["padding"].shape == (64,)
        assert (item["input_ids"][length:] == PAD).all()
        assert (item["labels"][length:] == IGNORE_INDEX).all()
        (needle,), _, _ = read(item["input_ids"][:length].numpy())
        seen.append((length, needle[0]))
    assert {length for length, _ in seen} == {max(data.needles.least_length, x) for x in (16, 32, 64)}
    assert seen[:33] == seen[33:]
    lengths = {int((~data.train_set[index]["padding"]).sum()) for index in range(50)}
    assert len(lengths) > 20
    first = {s.first_seed for s in (data.train_set, data.val_set, data.test_set)}
    assert len(first) == 3
    with pytest.raises(IndexError):
        data.val_set[66]


def test_grid_examples_tell_their_length_and_depth() -> None:
    data = NeedleDataModule(64, **SMALL, train_examples=50, val_examples=66, test_examples=33)
    data.setup("fit")
    assert data.answer_groups == {"length": [16, 32, 64], "depth": [*DEPTHS]}
    for index in range(66):
        item = data.val_set[index]
        assert item["length"] == (~item["padding"]).sum()
        assert item["depth"] == DEPTHS[index % 11]
        assert item["length"].dtype == item["depth"].dtype == torch.int64
    assert set(data.train_set[0]) == {"input_ids", "labels", "padding", "is_answer"}
    assert NeedleDataModule(24, **SMALL).answer_groups["length"] == [15, 24]  # a quarter and a half are too short


@pytest.mark.parametrize("length", [15, 60, 257])
def test_tasks_of_any_length(length: int) -> None:
    task = NeedleDataModule(60, **SMALL).task_at(length)
    inputs, labels = task.generate(3, length, 70)
    (needle,), asked, _ = read(inputs)
    assert len(inputs) == length
    assert needle == (1 + round(0.7 * (length - 15)), asked, tuple(labels[-3:].tolist()))
    with pytest.raises(ValueError, match="sequence_length: expected at least 15 for these needles, got 14"):
        NeedleDataModule(60, **SMALL).task_at(14)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"length": 12}, "sequence_length: expected at least 15 for these needles, got 12"),
        ({"haystack": "hay"}, r"haystack: expected one of \['fillers', 'needles'\], got 'hay'"),
        ({"haystack": "needles", "num_needles": 2}, "num_needles: expected 1 in a haystack of needles"),
        ({"key_symbols": 2, "num_needles": 5}, r"expected a key for each of 5 needles, got 4"),
        ({"value_length": 0}, "value_length: expected at least 1, got 0"),
    ],
)
def test_impossible_needles(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_task(**changed)


def test_a_model_trains_on_them(tmp_path: Path) -> None:
    configs = [f"--config={Path(__file__).parents[3] / 'configs' / x}.yaml" for x in ("model/mqar", "data/needles")]
    small = ["--data.sequence_length=64", "--data.batch_size=4", "--data.val_examples=33", "--trainer.max_steps=2"]
    trainer = [f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu", "--trainer.logger=false"]
    cli = build_cli(["fit", *configs, *small, *trainer, "--trainer.val_check_interval=2"])
    figures = cli.trainer.callback_metrics
    assert 0 <= figures["val/answers"] <= figures["val/accuracy"] < 1
    assert torch.isfinite(figures["val/loss"])
