"""Needles in an evaluation: reading in chunks with a cache gives the same as one forward pass, cell by cell."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_models import ATTENTIONS, TASK, FindsValues, SaysAlways, make_model

from dma_lightning.data.base import IGNORE_INDEX
from dma_lightning.data.drawn import SPLIT_STRIDE
from dma_lightning.data.needles import NeedleTask
from dma_lightning.evaluation import NeedleGrid, Reader, needle_cells
from dma_lightning.evaluation.needles import answer_scores, cell_seed, means
from dma_lightning.evaluation.scores import Scores

GRID = NeedleGrid((0, 50, 100), examples=5, batch_size=4)


def examples(task: NeedleTask, length: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels of a task, `[count, length]`."""
    pairs = [task.generate(seed, length, 10.0 * seed) for seed in range(count)]
    inputs, labels = (torch.from_numpy(np.stack(rows)) for rows in zip(*pairs, strict=True))
    return inputs, labels


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("full", [False, True])
def test_answers_from_the_cache_are_those_of_one_forward_pass(attention: str, full: bool) -> None:
    model, (inputs, labels) = make_model(attention), examples(TASK, 57, 6)
    with torch.no_grad():
        expected = Scores.of(model(inputs), labels)
    for chunk in (1, 7, 57):
        reader = Reader(model, chunk_size=chunk, full_cache=full)
        with reader.inferring():
            found = answer_scores(reader, inputs, labels)
        torch.testing.assert_close(found.nats, expected.nats, rtol=1e-10, atol=1e-10)
        assert torch.equal(found.right, expected.right)
        assert found.labels.tolist() == [3] * 6


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_an_answer_is_right_if_greedy_decoding_gives_it(attention: str) -> None:
    """The labels of every second example are what the model says itself."""
    model, (inputs, labels) = make_model(attention), examples(TASK, 40, 8)
    said = model.generate(inputs[:, :38], 3)
    labels[::2, -3:], inputs[::2, 38:] = said[::2], said[::2, :-1]
    reader = Reader(model)
    with reader.inferring():
        scores = answer_scores(reader, inputs, labels)
    greedy = (said == labels[:, -3:]).all(-1)
    assert torch.equal(scores.right == scores.labels, greedy)
    assert greedy[::2].all()
    assert not greedy.all()


@pytest.mark.parametrize("attention", ["dma", "mha"])
def test_cells_depend_on_neither_batches_nor_chunks_nor_other_cells(attention: str) -> None:
    model = make_model(attention)
    expected = {cell.depth: cell for cell in needle_cells(Reader(model), TASK, 57, GRID).cells}
    for grid, chunk in (
        (replace(GRID, batch_size=1), 2048),
        (replace(GRID, batch_size=100), 13),
        (replace(GRID, depths=(100, 0, 50)), 2048),
        (replace(GRID, depths=(50,)), 2048),
    ):
        found = needle_cells(Reader(model, chunk_size=chunk), TASK, 57, grid).cells
        assert [cell.depth for cell in found] == [float(depth) for depth in grid.depths]
        for cell in found:
            same = expected[cell.depth]
            assert cell.loss == pytest.approx(same.loss, rel=1e-10)
            assert replace(cell, loss=same.loss) == same


def test_seeds_are_those_of_the_test_split_and_of_a_cell_alone() -> None:
    seeds = {cell_seed(length, depth) for length in (64, 640) for depth in range(101)}
    assert len(seeds) == 202
    assert all(2 * SPLIT_STRIDE <= seed < 3 * SPLIT_STRIDE - (1 << 20) for seed in seeds)
    assert cell_seed(64, 10) == cell_seed(64, 10.0) == 2 * SPLIT_STRIDE + 677053003  # for good


@pytest.mark.parametrize("task", [TASK, replace(TASK, num_needles=3), replace(TASK, haystack="needles", key_symbols=7)])
def test_a_model_that_finds_the_value_is_always_right(task: NeedleTask) -> None:
    for length in (task.least_length, 60, 131):
        row = needle_cells(Reader(FindsValues(), chunk_size=50), replace(task, sequence_length=length), length, GRID)
        assert [(cell.answers, cell.accuracy) for cell in row.cells] == [(1, 1)] * 3
        assert row.chance == 4**-3


def test_a_model_that_says_one_token_is_right_where_that_is_the_value() -> None:
    token = 6 + TASK.key_symbols
    cell = needle_cells(Reader(SaysAlways(token)), TASK, 60, NeedleGrid((30,), examples=50)).cells[0]
    labels = [TASK.generate(cell.first_seed + i, 60, 30)[1][-3:] == token for i in range(50)]
    assert cell.accuracy == pytest.approx(np.mean(labels))
    assert cell.answers == np.mean(np.all(labels, axis=1))
    assert 0.1 < cell.accuracy < 0.4
    nats = np.log(np.e + TASK.vocab_size - 1)  # its logits are 1 and zeros
    assert cell.loss == pytest.approx(nats - cell.accuracy)


def test_longer_answers_of_a_batch_do_not_cut_shorter_ones() -> None:
    model, (inputs, labels) = make_model("dma"), examples(TASK, 40, 4)
    labels[1, -3] = IGNORE_INDEX
    with torch.no_grad():
        expected = Scores.of(model(inputs), labels)
    reader = Reader(model)
    with reader.inferring():
        found = answer_scores(reader, inputs, labels)
    assert found.labels.tolist() == [3, 2, 3, 3]
    torch.testing.assert_close(found.nats, expected.nats, rtol=1e-10, atol=1e-10)


def test_means_are_over_cells() -> None:
    cells = needle_cells(Reader(make_model("dma")), TASK, 57, GRID).cells
    assert means(cells)["loss"] == pytest.approx(np.mean([cell.loss for cell in cells]))
    assert means([]) == {"answers": None, "accuracy": None, "loss": None}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"depths": ()}, "depths: expected at least one, each from 0 to 100 percent, got \\[\\]"),
        ({"depths": (0, 101)}, "depths: expected at least one"),
        ({"examples": 0}, "examples: expected 1 to 1048576 per cell, got 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
    ],
)
def test_grids_that_cannot_be(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(GRID, **changed)


def test_a_chunk_has_positions() -> None:
    with pytest.raises(ValueError, match="chunk_size: expected at least 1, got 0"):
        Reader(make_model("dma"), chunk_size=0)
