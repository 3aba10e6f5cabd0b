"""Scores of sequences, and their time and memory."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from small_models import ATTENTIONS, SHAPE, TASK, make_model

from dma_lightning import InductionDataModule, NeedleDataModule
from dma_lightning.data.base import IGNORE_INDEX
from dma_lightning.evaluation import Reader, length_scores
from dma_lightning.evaluation.costs import Cost, cache_bytes
from dma_lightning.evaluation.lengths import sequence_scores
from dma_lightning.evaluation.scores import Scores


class Texts:
    """Sequences of random tokens in documents, with the bytes of their labels."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> dict[str, Any]:
        random = np.random.RandomState(index)
        tokens = torch.from_numpy(random.randint(TASK.vocab_size, size=64))
        labels = torch.where(torch.from_numpy(random.rand(63) < 0.9), tokens[1:], IGNORE_INDEX)
        documents = torch.from_numpy((random.rand(63) < 0.05).cumsum())
        return {"input_ids": tokens[:-1], "labels": labels, "documents": documents, "label_bytes": torch.tensor(100)}


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_chunks_from_the_cache_are_one_forward_pass(attention: str) -> None:
    model, data = make_model(attention), Texts()
    batch = {name: torch.stack([data[i][name] for i in range(5)]) for name in data[0]}
    with torch.no_grad():
        expected = Scores.of(model(batch["input_ids"], batch["documents"]), batch["labels"])
    for chunk in (1, 10, 63):
        reader = Reader(model, chunk_size=chunk)
        with reader.inferring():
            found = sequence_scores(reader, batch)
        torch.testing.assert_close(found.nats, expected.nats, rtol=1e-10, atol=1e-10)
        assert torch.equal(found.right, expected.right)
        assert torch.equal(found.labels, expected.labels)
    row = length_scores(Reader(model, chunk_size=10), data, examples=100, batch_size=2)
    assert row.loss == pytest.approx(expected.loss, rel=1e-10)
    assert row.accuracy == expected.accuracy
    assert row.bits_per_byte == pytest.approx(expected.nats.sum().item() / 500 / math.log(2))
    assert (row.length, row.sequences, row.labels, row.answers) == (63, 5, int(expected.labels.sum()), None)
    assert length_scores(Reader(model), data, examples=3, batch_size=2).sequences == 3


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_padded_answers_count_as_wholes(attention: str) -> None:
    sizes = {"key_symbols": 5, "value_symbols": 4, "filler_symbols": 6, "key_length": 2, "value_length": 1}
    data = NeedleDataModule(60, **sizes)
    data.setup("test")
    model, items = make_model(attention), [data.test_set[i] for i in range(40)]
    inputs, labels, padding = (torch.stack([x[name] for x in items]) for name in ("input_ids", "labels", "padding"))
    with torch.no_grad():
        expected = Scores.of(model(inputs, padding=padding), labels)
    row = length_scores(Reader(model, chunk_size=16), data.test_set, examples=40, batch_size=7)
    assert row.loss == pytest.approx(expected.loss, rel=1e-10)
    assert row.answers == expected.answers
    assert row.bits_per_byte is None


def test_one_label_is_an_answer() -> None:
    data = InductionDataModule(SHAPE.vocab_size, 50)
    data.setup("test")
    row = length_scores(Reader(make_model("mha")), data.test_set, examples=200, batch_size=64)
    assert row.answers == row.accuracy


def test_scores_without_labels_are_no_numbers() -> None:
    scores = Scores.of(torch.randn(2, 3, 5), torch.full((2, 3), IGNORE_INDEX))
    assert all(math.isnan(x) for x in (scores.loss, scores.accuracy, scores.answers))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_cost_counts_what_the_cache_holds(attention: str) -> None:
    """Besides the numbers that the mixer counts, a cache knows where they stand."""
    model, length, batch = make_model(attention, torch.float32), 64, 3
    reader = Reader(model)
    with reader.inferring():
        cost = Cost.measured(reader, torch.randint(TASK.vocab_size, (batch, length)))
        again = Cost.measured(reader, torch.randint(TASK.vocab_size, (2 * batch, length)))
    numbers = sum(mixer.cache_elements(length) for mixer in model.mixers)
    places = 2 * 32 * (length + 9) * len(model.mixers)  # at most 32 bytes for each place of each of two KV heads
    assert 4 * numbers <= cost.cache_bytes <= 4 * numbers + places
    assert again.cache_bytes == pytest.approx(cost.cache_bytes, rel=0.1)
    assert 0 < cost.prompt_seconds_per_token < cost.step_seconds
    assert (cost.batch_size, cost.peak_memory_bytes) == (3, None)


def test_no_more_than_a_chunk_is_read_at_once() -> None:
    model, read = make_model("dma"), []
    model.lm_head.register_forward_hook(lambda module, inputs, logits: read.append(logits.shape[1]))
    length_scores(Reader(model, chunk_size=10), Texts(), examples=5, batch_size=5)
    assert max(read) == 10


@pytest.mark.parametrize("attention", ["dma", "swa"])
def test_the_cache_of_a_window_does_not_grow(attention: str) -> None:
    reader, sizes = Reader(make_model(attention), chunk_size=32), []
    with reader.inferring():
        for length in (100, 400):
            sizes.append(cache_bytes(reader.prompt(torch.randint(TASK.vocab_size, (1, length)))[0]))
    assert sizes[0] == sizes[1]


def test_tensors_are_counted_once() -> None:
    x = torch.zeros(10)
    assert cache_bytes([{"a": x, "b": x[:5]}, (x, torch.zeros(2))]) == 48
